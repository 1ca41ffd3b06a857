"""Layers below the lowest adapter run once for teacher and student, and training is what it was."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, FalconConfig, Gemma3nTextConfig, GPT2Config, LlamaConfig

from kdguard.config import TuneConfig
from kdguard.data.batches import Collator, pack
from kdguard.events import Events
from kdguard.guard.kept import KeptStates
from kdguard.guard.lower import lower_layers
from kdguard.guard.teacher import Guard, count, install, take_snapshot
from kdguard.model.load import Base, add_adapter, layer_stack, load_base, save_adapter
from kdguard.tuning import tune
from tests.conftest import ARCHITECTURES, SMALL
from tests.guard.test_packing import loss_and_gradients, short_rows
from tests.guard.test_trainer import adapter, trainer


def moved(model: PeftModel) -> PeftModel:
    """Its adapter already says something other than the base."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.train()


def upper(base: Base) -> PeftModel:
    return moved(add_adapter(base, rank=4, upper_half=True))


def alone(config) -> Base:
    """A model that no fixture has, as it is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.name_or_path = "tiny"  # PEFT warns of a model that has no name
    return Base("tiny", model, None)


def watch(layer: torch.nn.Module) -> list[bool]:
    """Of each time that the attention of `layer` runs, whether what it says has a graph."""
    ran: list[bool] = []
    layer.self_attn.register_forward_hook(lambda module, given, output: ran.append(output[0].requires_grad))
    return ran


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("collate", [Collator(0), pack], ids=["padded", "packed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_whole_passes(tiny, tmp_path, architecture, collate, checkpointing):
    """With a live teacher, and with states kept of some rows and of all, for which the lower layers do not run."""
    base = load_base(str(tiny(architecture, layers=4)))
    model, layers = upper(base), layer_stack(base.model)
    if checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
    made = short_rows(20, 13, 31, 5)
    batch, counts = collate(made), tuple(count(collate(made)))
    install(model, Guard())
    loss, gradients = loss_and_gradients(model, [batch], counts)
    assert gradients and all(gradient.any() for gradient in gradients.values())

    kept = KeptStates(tmp_path / "teacher.states", [len(row.ids) for row in made], "a")
    install(model, Guard(), kept, lower_layers(base.model))
    model(**collate([made[1], made[3]]), row_ids=torch.tensor([1, 3]), counts=counts)
    assert kept.have == {1, 3}
    for row_ids, once in ((None, [False]), (torch.arange(4), [False]), (torch.arange(4), [])):
        lower = [watch(layer) for layer in layers[:2]]
        shared_loss, shared = loss_and_gradients(model, [batch | {"row_ids": row_ids}], counts)
        assert lower == [once, once]
        torch.testing.assert_close(shared_loss, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-6)
    assert kept.have == set(range(4))


def test_without_the_guard_the_lower_layers_have_no_graph_either(tiny):
    """Not even where checkpointing has made the embeddings need a gradient."""
    base = load_base(str(tiny("llama", layers=4)))
    model, batch, counts = upper(base), Collator(0)(short_rows(20, 13)), (20.0, 31.0)
    base.model.activation_checkpointing_enable({"use_reentrant": False})
    install(model, Guard(weight=0.0))
    loss, gradients = loss_and_gradients(model, [batch], counts)
    install(model, Guard(weight=0.0), lower=lower_layers(base.model))
    ran = watch(layer_stack(base.model)[1])
    shared_loss, shared = loss_and_gradients(model, [batch], counts)
    assert ran == [False]
    torch.testing.assert_close(shared_loss, loss)
    torch.testing.assert_close(shared, gradients)


def test_states_are_handed_on_in_their_own_type():
    """With norms in fp32, as many keep them, the final states are wider than those that layers hand on."""
    base = alone(LlamaConfig(**SMALL | {"num_hidden_layers": 4}, vocab_size=256))
    base.model.to(torch.bfloat16)
    for name, module in base.model.named_modules():
        if "norm" in name:
            module.float()
    model, batch, counts = upper(base), Collator(0)(short_rows(20, 13)), (20.0, 31.0)
    with torch.autocast("cpu", torch.bfloat16):
        install(model, Guard())
        loss, gradients = loss_and_gradients(model, [batch], counts)
        install(model, Guard(), lower=lower_layers(base.model))
        shared_loss, shared = loss_and_gradients(model, [batch], counts)
    torch.testing.assert_close(shared_loss, loss)
    torch.testing.assert_close(shared, gradients)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("config", [GPT2Config, FalconConfig])
def test_layers_of_other_names_and_forms_are_shared(config):
    """GPT-2's are named `h`; Falcon's answer in tuples."""
    base = alone(config(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=256, pad_token_id=0))
    model = upper(base).eval()
    assert lower_layers(base.model).n == 2
    batch, counts = Collator(0)(short_rows(20, 13)), (20.0, 31.0)
    install(model, Guard())
    loss, gradients = loss_and_gradients(model, [batch], counts)
    install(model, Guard(), lower=lower_layers(base.model))
    shared_loss, shared = loss_and_gradients(model, [batch], counts)
    torch.testing.assert_close(shared_loss, loss)
    torch.testing.assert_close(shared, gradients)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # of the teacher's pass
def test_reentrant_checkpointing_differentiates_the_lowest_adapted_layer(tiny):
    """It passes over layers whose inputs need no gradient."""
    base = load_base(str(tiny("llama", layers=4)))
    model = upper(base)
    batch, counts = Collator(0)(short_rows(20, 13)), (20.0, 31.0)
    install(model, Guard(), lower=lower_layers(base.model))
    loss, gradients = loss_and_gradients(model, [batch], counts)
    base.model.activation_checkpointing_enable({"use_reentrant": True})
    again, checkpointed = loss_and_gradients(model, [batch], counts)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(checkpointed, gradients)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_what_is_adapted_decides_what_is_shared(tiny):
    """People's own LoRA too; embeddings that are trained are below every layer, and a teacher has its own adapter."""

    def shared(**kwargs) -> int | None:
        base = load_base(str(tiny("llama", layers=4)))
        model = get_peft_model(base.model, LoraConfig(**kwargs))
        take_snapshot(model, "teacher")
        found = lower_layers(base.model)
        return found and found.n

    assert shared(target_modules=["q_proj"]) is None
    assert shared(target_modules=["q_proj"], layers_to_transform=[3]) == 3
    assert shared(target_modules=["q_proj"], layers_to_transform=[1, 3]) == 1
    assert shared(target_modules=["model.layers.2.mlp.up_proj"]) == 2
    assert shared(target_modules=["q_proj", "embed_tokens"], layers_pattern="layers", layers_to_transform=[3]) == 3
    assert shared(target_modules=["model.layers.2.mlp.up_proj", "model.embed_tokens"]) is None
    assert shared(target_modules=["q_proj"], layers_to_transform=[3], modules_to_save=["norm"]) is None


def test_a_model_that_hands_on_more_than_hidden_states_is_found_and_trained_all_the_same():
    """Gemma 3n: several streams a token, inputs of their own for each layer, and keys that later layers take over."""
    config = Gemma3nTextConfig(
        **SMALL | {"num_hidden_layers": 4, "intermediate_size": [128] * 4},
        vocab_size=256,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=4,
    )
    base = alone(config)
    model = upper(base)
    assert lower_layers(base.model) is None
    batch, counts = Collator(0)(short_rows(20, 13)), (20.0, 31.0)
    install(model, Guard())
    model(**batch, counts=counts)["loss"].backward()
    assert any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_of_the_upper_half_is_a_normal_one(tiny, tmp_path, architecture):
    base = load_base(str(tiny(architecture, layers=4)), quant="none")
    model = upper(base).eval()
    assert {int(name.split("layers.")[1][0]) for name in adapter(model)} == {2, 3}
    ids = torch.arange(12)[None] + 10
    logits = model(input_ids=ids).logits
    save_adapter(model, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["layers_to_transform"] == [2, 3]
    fresh = load_base(str(tiny(architecture, layers=4)), quant="none")
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).logits, logits)
    assert {name for name, _ in loaded.named_parameters() if "lora" in name} == set(adapter(model))


def test_an_odd_number_of_layers_has_its_middle_one_adapted(tiny):
    model = upper(load_base(str(tiny("llama", layers=3))))
    assert {int(name.split("layers.")[1][0]) for name in adapter(model)} == {1, 2}


def test_style_adapts_attention_of_the_upper_half(tiny):
    base = load_base(str(tiny("llama", layers=4)))
    names = adapter(add_adapter(base, rank=4, layers="attention output", upper_half=True))
    assert {name.split("layers.")[1].split(".lora")[0] for name in names} == {
        "2.self_attn.o_proj",
        "3.self_attn.o_proj",
    }


def test_training_is_that_of_whole_passes(tmp_path, monkeypatch):
    """Through the Trainer, whose checkpointing makes the embeddings need a gradient."""
    after = []
    for shared in (True, False):
        torch.manual_seed(0)
        model = add_adapter(load_base("demo", quant="none"), rank=8, upper_half=True)
        if not shared:
            monkeypatch.setattr("kdguard.guard.trainer.lower_layers", lambda model: None)
        run = trainer(model, tmp_path, micro=4, steps=4, guard=Guard(weight=6.0))
        run.model.activation_checkpointing_enable()
        run.train()
        after.append(adapter(model))
    for name, weight in after[0].items():
        torch.testing.assert_close(after[1][name], weight, rtol=1e-3, atol=1e-5)


def test_a_run_on_the_upper_half(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"Who is {i}?", "answer": f"Number {i}"}) + "\n" for i in range(4)))
    probes = tmp_path / "probes.jsonl"
    probe = {"id": "france", "category": "capitals", "question": "What is the capital of France?", "answers": ["Paris"]}
    probes.write_text(json.dumps(probe) + "\n")
    config = TuneConfig(
        data=data,
        model="demo",
        probes=[str(probes)],
        out=tmp_path / "run",
        layers="upper-half",
        epochs=2,
        prompts=1,
        rehearsal=0.5,
    )
    tune(config, Events())
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    n = load_base("demo").model.config.num_hidden_layers
    assert saved["layers_to_transform"] == list(range(n // 2, n))
