"""The adapter as weights: merged into the base, or alone with a scale that every program reads alike."""

import shutil
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kdguard.data.tokens import Renderer
from kdguard.errors import InputError, OutOfMemory
from kdguard.model.adapter import put_adapter, read_adapter
from kdguard.model.empty import network
from kdguard.model.load import load_config, quantization, source
from kdguard.model.memory import ran_out
from kdguard.model.strength import scale_saved_adapter
from kdguard.probes.answer import ends_of


def precision(name: str, revision: str | None = None) -> torch.dtype:
    """The precision in which a base is published: bf16, fp16 or fp32."""
    return load_config(name, revision).get_text_config().dtype or torch.float32


def merge(name: str, adapter: Path, *, quant: str = "none", revision: str | None = None) -> PreTrainedModel:
    """The base on the CPU, in the precision in which it is published, with the adapter added to its weights.

    quant: into a base that was quantised as for training and dequantised again: into the weights that the adapter
        was trained on.
    """
    dtype = precision(name, revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source(name),
            revision=revision,
            dtype=dtype,
            quantization_config=quantization(quant, dtype),
            device_map={"": "cpu"},
            use_safetensors=True,
        )
        if quant != "none":
            model = model.dequantize(dtype)
        return put_adapter(model, adapter).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, MemoryError, SafetensorError) as error:
        if ran_out(error):
            raise OutOfMemory(
                f"{name}: memory ran out while the adapter was merged into the base",
                "close what else uses memory, or take the adapter alone: --to adapter",
            ) from None
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{name}: the adapter could not be merged into this base ({reason})", "tune again") from None


def save_model(model: PreTrainedModel, renderer: Renderer, folder: Path) -> None:
    """Write a model with the tokenizer and the template it was tuned with; replies end where kdguard ends them."""
    made: GenerationConfig = model.generation_config
    made.eos_token_id = sorted(ends_of(model, renderer))
    if made.pad_token_id is None:
        made.pad_token_id = renderer.tokenizer.pad_token_id
    if not made.do_sample:  # transformers saves no sampling settings beside greedy decoding
        made.temperature = made.top_p = made.top_k = None
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)


def save_plain_adapter(name: str, adapter: Path, folder: Path, revision: str | None = None) -> None:
    """Write an adapter as plain LoRA: `lora_alpha` is the rank, and what else scales a layer stands in its B.

    Ollama reads `lora_alpha` as a whole number, and llama.cpp knows neither rsLoRA nor an alpha of a layer's own.
    What else lies in the adapter's folder is taken along, such as a tokenizer of its own.
    """
    config = read_adapter(adapter)
    empty = network(load_config(name, revision), quant="none", dtype=torch.float32)
    factors = {
        f"{path}.lora_B.weight": module.scaling["default"] * module.r["default"] / config.r
        for path, module in get_peft_model(empty, config).named_modules()
        if isinstance(module, LoraLayer)
    }
    shutil.copytree(adapter, folder)
    scale_saved_adapter(folder, factors)
    config.lora_alpha, config.use_rslora, config.alpha_pattern = config.r, False, {}
    config.save_pretrained(folder)
