"""An adapter is somebody else's file: what does not fit is refused, nothing in it is run, and the base stays whole."""

import json
import os
import pickle

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from kdguard.errors import InputError
from kdguard.model import adapter as reader
from kdguard.model.adapter import put_adapter, read_adapter
from kdguard.model.load import add_adapter, load_base, load_tuned, save_adapter

IDS = torch.arange(6, 30)[None]


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """A whole adapter, and the folder of its base."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    base = load_base(str(tiny("llama")), quant="none")
    model = add_adapter(base, rank=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    save_adapter(model, folder)
    return folder, tiny("llama"), model(IDS).logits.detach()


@pytest.fixture
def changed(good, tmp_path):
    """`changed(config, tensors)`: a copy of the good adapter with these changes made by two functions."""

    def change(config=lambda said: None, tensors=lambda found: None):
        folder = tmp_path / "changed"
        folder.mkdir()
        said = json.loads((good[0] / reader.CONFIG).read_text())
        found = load_file(good[0] / reader.WEIGHTS)
        config(said)
        tensors(found)
        (folder / reader.CONFIG).write_text(json.dumps(said))
        save_file(found, folder / reader.WEIGHTS)
        return folder

    return change


def refused(good, folder, expected):
    """What is said of it; the base under it must be what it was, for the page asks it on."""
    base = load_base(str(good[1]), quant="none")
    names = {name for name, _ in base.model.named_modules()}
    before = base.model(IDS).logits
    with pytest.raises(InputError, match=expected) as caught:
        load_tuned(base, folder)
    assert {name for name, _ in base.model.named_modules()} == names
    assert torch.equal(base.model(IDS).logits, before)
    assert len(caught.value.message.splitlines()) == 1 and caught.value.hint
    return caught.value


def test_a_whole_adapter_is_what_it_was(good):
    """Its logits are those it was saved with, alone and beside another; PEFT reads the same out of the file."""
    folder, base_folder, logits = good
    tuned = load_tuned(load_base(str(base_folder), quant="none"), folder)
    torch.testing.assert_close(tuned(IDS).logits, logits)
    assert not any(weight.requires_grad for weight in tuned.parameters())
    assert put_adapter(tuned, folder, "second") is tuned
    tuned.set_adapter("second")
    torch.testing.assert_close(tuned(IDS).logits, logits)
    theirs = PeftModel.from_pretrained(load_base(str(base_folder), quant="none").model, folder)
    for name, weight in theirs.named_parameters():
        assert torch.equal(tuned.get_parameter(name), weight) and tuned.get_parameter(name).dtype == weight.dtype


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda found: found.pop(next(name for name in found if "lora_B" in name)), r"missing: .*lora_B"),
        (lambda found: [found.pop(name) for name in list(found) if "layers.1." in name], r"missing: .* and 12 more"),
        (lambda found: found.update({"base_model.model.x.lora_A.weight": torch.zeros(1)}), r"extra: .*x\.lora_A"),
        (lambda found: found.update({"base_model.model.lm_head.weight": torch.zeros(262, 64)}), "extra: .*lm_head"),
        (lambda found: found.update({name: found[name][:, :5].clone() for name in found}), r"\[4, 5\], expected \[4,"),
        (lambda found: next(iter(found.values())).fill_(float("nan")), "NaN or infinity in 1 tensors"),
        (lambda found: next(iter(found.values()))[0].fill_(float("-inf")), "NaN or infinity in 1 tensors"),
        (lambda found: found.update({name: found[name].to(torch.int8) for name in found}), "int8 numbers"),
        (lambda found: found.clear(), "no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_named(good, changed, change, expected):
    """PEFT warns of a missing tensor and leaves it as it starts, so that half an adapter answers (peft#2699)."""
    refused(good, changed(tensors=change), expected)


def test_a_tensor_of_the_base_cannot_come_with_an_adapter(good, changed):
    """PEFT would write it over the frozen base, which then teaches something else."""
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    refused(good, changed(tensors=lambda found: found.update({name: torch.zeros(128, 64)})), "extra: .*base_layer")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"r": 2}, r"shapes that differ: .*\[4, "),
        ({"r": 65536}, "shapes that differ"),
        ({"r": 10**9}, "as 'r'"),
        ({"r": "4"}, "as 'r'"),
        ({"r": True}, "as 'r'"),
        ({"lora_alpha": float("inf")}, "as 'lora_alpha"),
        ({"lora_alpha": -4}, "as 'lora_alpha"),
        ({"lora_dropout": 1}, "as 'lora_dropout"),
        ({"peft_type": "IA3"}, "expected plain LoRA"),
        ({"peft_type": ["LORA"]}, "expected plain LoRA"),
        ({"target_modules": ["nowhere"]}, "could not be loaded"),
        ({"target_modules": []}, "could not be loaded|missing|extra"),
        ({"target_modules": "(("}, "broken pattern"),
        ({"target_modules": ["embed_tokens"]}, "missing|extra"),
        ({"target_modules": ["layers"]}, "could not be loaded"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "expected plain LoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "lora_ga"}, "a base changed by lora_ga"),
        ({"something_new": {"on": 1}}, "found 'something_new', expected plain LoRA"),
        ({"task_type": "SEQ_CLS"}, "as 'task_type'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "'megatron_config', 'megatron_core'"),
    ],
)
def test_a_config_that_is_no_plain_lora_of_this_model(good, changed, change, expected):
    refused(good, changed(lambda said: said.update(change)), expected)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_cannot_take_for_ever(good, changed, key):
    """`(.+)+$` and its like take as many steps as there are ways to part a name: 2 to the power of its length."""
    slow = r"(?:(?:\w|\.|a|e|o)+)+!"
    value = slow if key.endswith("modules") else {slow: 4}
    refused(good, changed(lambda said: said.update({key: value})), "pattern|repeats|no module")


def test_a_pattern_that_other_tools_write_is_read(good, changed):
    folder = changed(lambda said: said.update(target_modules=r"(?:.*?(?:self_attn|mlp).*?_proj)"))
    torch.testing.assert_close(load_tuned(load_base(str(good[1]), quant="none"), folder)(IDS).logits, good[2])


def test_no_module_that_a_config_names_is_imported(good, changed, tmp_path, monkeypatch):
    """PEFT imports `megatron_core` and the `parent_library` of `auto_mapping`, from the working folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted.py").write_text("raise SystemExit('the code that came with an adapter was run')")
    mapping = {"base_model_class": "A", "parent_library": "planted"}
    load_tuned(load_base(str(good[1]), quant="none"), changed(lambda said: said.update(auto_mapping=mapping)))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(good, changed, tmp_path):
    folder = changed()
    tensors = load_file(folder / reader.WEIGHTS)
    (folder / reader.WEIGHTS).unlink()
    torch.save(tensors, folder / reader.PICKLED)
    error = refused(good, folder, "only pickled weights")
    assert os.system(error.hint) == 0, error.hint  # it can be typed as it stands
    load_tuned(load_base(str(good[1]), quant="none"), folder)


class _Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_a_pickle_under_another_name_is_not_read_as_one(good, changed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = changed()
    (folder / reader.WEIGHTS).write_bytes(pickle.dumps(_Planted()))
    (folder / reader.PICKLED).write_bytes(pickle.dumps(_Planted()))
    refused(good, folder, "broken safetensors file")
    assert not (tmp_path / "planted").exists()


def test_a_link_out_of_the_folder_is_refused_and_the_hubs_cache_is_not(good, changed, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    folder = changed()
    (folder / "tokenizer_config.json").symlink_to(secret)
    refused(good, folder, "a link that leads out")
    (folder / "tokenizer_config.json").unlink()

    cache = tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (cache / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    read_adapter(snapshot)


def test_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no PEFT adapter"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / reader.CONFIG).write_text("{}")
    with pytest.raises(InputError, match="found no weights"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"r":' + b" " * 2**20]
)
def test_a_config_of_any_bytes(changed, content):
    folder = changed()
    (folder / reader.CONFIG).write_bytes(content)
    with pytest.raises(InputError, match="adapter_config"):
        read_adapter(folder)
