"""The strength of an adapter: its scale, from 0 (the base) to 1 (as trained).

Scaling LoRA's B interpolates linearly between the base's weights and the tuned ones (WiSE-FT, arXiv 2109.01903).
"""

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file

from kdguard.files import sync


def scale_adapter(model: PeftModel, factor: float) -> None:
    """Multiply the active adapter's B matrices in place; `lora_alpha` stays the whole number that exporters need."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_B[model.active_adapter].weight.data.mul_(factor)


def scale_saved_adapter(folder: Path, factor: float | Mapping[str, float]) -> None:
    """The same for a saved adapter: `adapter_model.safetensors` is replaced as a whole.

    factor: one for all, or one for each B by its name.
    """
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    factors = factor if isinstance(factor, Mapping) else {name: factor for name in weights if "lora_B" in name}
    scaled = {name: weight * factors[name] if name in factors else weight for name, weight in weights.items()}
    beside = path.with_name(path.name + ".part")
    save_file(scaled, beside, metadata)
    sync(beside)
    beside.replace(path)
    sync(folder)
