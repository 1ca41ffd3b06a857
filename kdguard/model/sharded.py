"""Weights that FSDP spreads over the processes, for what does not go through its wrapper's forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def whole(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every process has all weights of `model`, to be read and not changed. All processes have to enter it."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def adapter_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all adapters by name, whole on every process. All processes have to call it."""
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in model.state_dict().items()
        if "lora_" in name
    }
