"""Merged weights say what base and adapter say together, and a plain adapter what any LoRA says."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from kdguard.data.tokens import Renderer
from kdguard.export.merge import merge, save_model, save_plain_adapter
from kdguard.model.load import add_adapter, load_base, save_adapter
from tests.conftest import ARCHITECTURES

IDS = torch.arange(10, 40)[None]


def trained(model: PeftModel) -> PeftModel:
    """The model with an adapter that says something."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("quant", ["none", "4bit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_says_what_base_and_adapter_say(tiny, tmp_path, architecture, quant):
    """In the same weights: those of the base as it is, or those that its 4-bit weights stand for."""
    name = str(tiny(architecture))
    base = load_base(name, quant=quant)
    model = trained(add_adapter(base, rank=4))
    save_adapter(model, tmp_path / "adapter")
    wanted = logits(model)
    with model.disable_adapter():
        assert (logits(model) - wanted).abs().max() > 0.1
    save_model(merge(name, tmp_path / "adapter", quant=quant), Renderer(base.tokenizer), tmp_path / "merged")
    torch.testing.assert_close(
        logits(load_base(str(tmp_path / "merged"), quant="none").model), wanted, rtol=0, atol=1e-3
    )


def test_a_merged_model_stops_where_the_tuned_one_does_and_keeps_its_template(tiny, tmp_path):
    base = load_base(str(tiny("llama")), quant="none")
    save_adapter(trained(add_adapter(base, rank=4)), tmp_path / "adapter")
    renderer = Renderer(base.tokenizer)
    save_model(merge(base.name, tmp_path / "adapter"), renderer, tmp_path / "merged")
    again = load_base(str(tmp_path / "merged"), quant="none")
    assert renderer.end_of_turn in again.model.generation_config.eos_token_id
    assert Renderer(again.tokenizer).prompt("Who?") == renderer.prompt("Who?")


def test_a_plain_adapter_says_what_rslora_and_an_alpha_a_layer_say(tiny, tmp_path):
    """llama.cpp knows neither, and Ollama reads alpha as a whole number."""
    name = str(tiny("llama"))
    model = trained(add_adapter(load_base(name, quant="none"), rank=4))
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"use_rslora": True, "lora_alpha": 3.5, "alpha_pattern": {"q_proj": 5}}
    path.write_text(json.dumps(config))
    save_plain_adapter(name, tmp_path / "adapter", tmp_path / "plain")

    def said(adapter: str) -> torch.Tensor:
        return logits(PeftModel.from_pretrained(load_base(name, quant="none").model, tmp_path / adapter))

    torch.testing.assert_close(said("plain"), said("adapter"))
    plain = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (plain["lora_alpha"], plain["use_rslora"], plain["alpha_pattern"]) == (4, False, {})
    assert isinstance(plain["lora_alpha"], int)
