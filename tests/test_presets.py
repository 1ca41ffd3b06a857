"""Every preset for a GPU says what its model is: the network it describes is the published one, to the parameter."""

import re
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kdguard.config import BEST, presets, resolve
from kdguard.files import shipped
from kdguard.model.head import head_of
from kdguard.model.load import LAYERS, Base, add_adapter, default_lr
from kdguard.probes.packs import shipped_packs

KEYS = [
    *("name", "license", "about", "model", "revision", "template", "target_modules", "head"),
    *("rank", "lr", "probes", "shape", "memory"),
]
GPU = {name: preset for name, preset in presets().items() if name != "demo"}
# As the hub counts the stored weights, tied ones once.
PUBLISHED = {
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "granite3.3-8b": 8_170_864_640,
    "granite4.2-3b": 3_659_737_600,
    "granite4.2-8b": 8_791_592_960,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "olmo2-7b": 7_298_617_344,
    "olmo3-7b": 7_298_011_136,
    "phi3.5-mini": 3_821_079_552,
    "phi4-mini": 3_836_021_760,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-1.7b": 2_031_739_904 - 151_936 * 2_048,  # its tied head is stored again
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "r1-distill-llama-8b": 8_030_261_248,
    "r1-distill-qwen-7b": 7_615_616_512,
    "smollm3-3b": 3_075_098_624,
}


@cache
def network(name: str) -> PreTrainedModel:
    """The network of a preset, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPU[name]["shape"]))


@pytest.mark.parametrize("name", GPU)
def test_a_preset_has_these_keys_in_this_order(name):
    preset = GPU[name]
    assert list(preset) == KEYS
    assert (shipped("presets") / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")
    assert re.fullmatch(r"[0-9a-f]{40}", preset["revision"])
    assert set(preset["probes"]) <= set(shipped_packs())


@pytest.mark.parametrize("name", GPU)
def test_the_shape_is_the_published_network(name):
    """A wrong width or an untied head would make the memory that is told without a download a guess."""
    assert sum(weight.numel() for weight in network(name).parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", GPU)
def test_every_key_of_the_shape_is_one_that_transformers_knows(name):
    """Another would be kept by the config and change nothing."""
    assert set(GPU[name]["shape"]) <= set(type(network(name).config)().to_dict())


@pytest.mark.parametrize("name", GPU)
def test_the_head_is_the_one_that_is_stated(name):
    model, stated = network(name), GPU[name]["head"]
    head = head_of(model)
    assert (head.scale, head.softcap) == (stated["scale"], stated["softcap"])
    assert (head.weight is model.get_input_embeddings().weight) == stated["tied"]


@pytest.mark.parametrize("name", GPU)
def test_the_adapter_is_on_the_layers_that_are_stated(name):
    preset = GPU[name]
    config = AutoConfig.for_model(**{**preset["shape"], "num_hidden_layers": 2}, name_or_path=preset["model"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tuned = add_adapter(Base(preset["model"], model, None), rank=2)
    assert tuned.peft_config["default"].target_modules == set(preset["target_modules"])
    assert any(re.search(LAYERS["attention output"], f"self_attn.{each}") for each in preset["target_modules"])


@pytest.mark.parametrize("name", GPU)
def test_the_learning_rate_is_that_of_the_width(name):
    assert GPU[name]["lr"] == default_lr(network(name))
    assert resolve({"data": "a.jsonl", "preset": name}).lr == GPU[name]["lr"]


def test_names_and_models_are_all_different():
    assert set(BEST) <= set(GPU)
    for key in ("name", "model"):
        values = [preset[key] for preset in presets().values()]
        assert len(set(values)) == len(values)
