"""Every architecture people tune: it loads in 4-bit, its adapters move, and its base stays what it was."""

import shutil

import pytest
import torch

from kdguard.data import IGNORE
from kdguard.data.tokens import Renderer, Row
from kdguard.errors import InputError
from kdguard.guard.teacher import Guard
from kdguard.model.head import check_head
from kdguard.model.load import add_adapter, base_view, load_base
from kdguard.probes.answer import generate
from tests.conftest import ARCHITECTURES
from tests.guard.test_trainer import trainer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_steps_move_every_layer_and_leave_the_base_bit_for_bit(tiny, tmp_path, architecture):
    base = load_base(str(tiny(architecture)))
    renderer = Renderer(base.tokenizer)
    generate(base.model, renderer, [renderer.prompt("Who?")], max_new_tokens=2)  # as a run does: probe, then train
    model = add_adapter(base, rank=4)
    ids = torch.arange(6, 30)[None]
    with base_view(model):
        before = model(input_ids=ids).logits
    rows = [Row(list(range(6 + i, 20 + i)), [IGNORE] * 8 + list(range(14 + i, 20 + i))) for i in range(8)]
    trainer(model, tmp_path, rows, guard=Guard(weight=1.0)).train()
    with base_view(model):
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert not torch.equal(model(input_ids=ids).logits, before)
    still = [name for name, weight in model.named_parameters() if "lora_B" in name and not weight.any()]
    assert not still
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_B.default")}
    linear = [name for name, module in base.model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(adapted) == len([name for name in linear if "base_layer" in name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_found_is_the_head_used(tiny, architecture):
    """Gemma 2 caps its logits, others scale them; a loss on other logits than the model's teaches something else."""
    check_head(load_base(str(tiny(architecture)), quant="none").model)


def test_a_head_that_does_more_is_refused(tiny):
    model = load_base(str(tiny("llama")), quant="none").model
    model.lm_head.register_forward_hook(
        lambda module, args, output: output + args[0].sum(-1, keepdim=True) ** 2 * output
    )
    with pytest.raises(InputError, match="output head does more"):
        check_head(model)


def test_base_view_restores_the_adapter_when_something_fails(demo):
    model = add_adapter(demo, rank=4)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    with pytest.raises(RuntimeError, match="inside"), base_view(model):
        assert not any(weight.requires_grad for weight in model.parameters())
        raise RuntimeError("inside")
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trainable


def test_four_bit_is_four_bit(demo):
    """A silent fall-back to full precision would fit on no gaming card."""
    linears = [m for name, m in demo.model.named_modules() if name.endswith("_proj")]
    assert linears and all(type(module).__name__ == "Linear4bit" for module in linears)
    assert all(module.weight.quant_state.nested for module in linears)
    assert all(module.weight.numel() * 2 == module.in_features * module.out_features for module in linears)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_style_goal_adapts_what_attention_gives_out_and_no_more(tiny, architecture):
    """The feed-forward layers are where facts are stored (arXiv 2604.15574); a format needs little."""
    base = load_base(str(tiny(architecture)))
    config = base.model.config.get_text_config()
    model = add_adapter(base, rank=4, layers="attention output")
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_B" in name]
    assert len(names) == config.num_hidden_layers and all("attn." in name for name in names)
    assert all(model.get_parameter(name).shape[0] == config.hidden_size for name in names)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nowhere", "no such model folder"),
        ("./nowhere", "no such model folder"),
        ("/no/where", "no such model folder"),
    ],
)
def test_a_model_that_is_not_there(name, expected):
    with pytest.raises(InputError, match=expected):
        load_base(name)


def test_a_folder_without_config_or_weights(tmp_path, tiny):
    with pytest.raises(InputError, match=r"found no config\.json"):
        load_base(str(tmp_path))
    (tmp_path / "config.json").write_text((tiny("llama") / "config.json").read_text())
    with pytest.raises(InputError, match="found no weights"):
        load_base(str(tmp_path))


def test_weights_that_are_not_safetensors_say_so(tmp_path, tiny):
    (tmp_path / "config.json").write_text((tiny("llama") / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(InputError, match="could not be loaded"):
        load_base(str(tmp_path))


def test_greedy_is_greedy_whatever_the_makers_recommend(tiny, tmp_path):
    """A repetition penalty in the makers' config would change the answers that are compared, and the rehearsal."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.5, "min_p": 0.1, "eos_token_id": 2}')
    made = load_base(str(folder)).model.generation_config
    assert (made.repetition_penalty, made.min_p, made.eos_token_id) == (None, None, 2)
