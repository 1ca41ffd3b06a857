"""What a run has to fit into: a GPU's memory, or this computer's."""

import re
from dataclasses import dataclass

import psutil

from kdguard.errors import InputError
from kdguard.gpu import gpus

SIZES = 8, 12, 16, 24  # GB of the cards that people have
CUDA = 0.5  # GiB that its libraries take of a GPU before anything is loaded
DISPLAY = 0.5  # GiB, where it cannot be asked


@dataclass(frozen=True)
class Card:
    """name: for people. total: GiB. taken: by display, other programs and CUDA, GiB. gpu: or else the computer."""

    name: str
    total: float
    taken: float
    gpu: bool

    @property
    def room(self) -> float:
        """GiB that are left for a run."""
        return self.total - self.taken


def of_size(size: float) -> Card:
    """A card of so many GB with a display on it."""
    return Card(f"a card of {size:g} GB", size, DISPLAY + CUDA, gpu=True)


def here() -> Card:
    """The first GPU of this computer or, where there is none, the computer. Raises KdguardError as `gpus` does."""
    gpu = next((gpu for gpu in gpus() if gpu.total and gpu.free is not None), None)
    if gpu is not None and gpu.total and gpu.free is not None:
        return Card(gpu.name, gpu.total, gpu.total - gpu.free + CUDA, gpu=True)
    memory = psutil.virtual_memory()
    return Card("this computer, without an NVIDIA GPU", memory.total / 2**30, memory.used / 2**30, gpu=False)


def gpu_memory() -> float | None:
    """GiB of the first GPU; None where there is none."""
    card = here()
    return card.total if card.gpu else None


def parse_size(text: str) -> float:
    """`8GB`, `8 GiB`, `8` or `8192MB` in GB. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(m|g)i?b?)?\s*", text, re.IGNORECASE)
    size = float(found[1]) / (1024 if (found[2] or "").lower() == "m" else 1) if found else 0.0
    if size <= 0:
        raise InputError(f"--vram {text!r}: not a size of memory", "--vram 8GB")
    return size
