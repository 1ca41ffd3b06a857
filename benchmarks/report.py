"""What every benchmark writes: its results as JSON, with the machine they were measured on."""

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from kdguard.files import write_whole

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The GPU's name, or the processor's with the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().split("\n")
        if line.startswith("model name")
    ]
    name = model[0] if model else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def write(name: str, results: Any) -> Path:
    """Write `results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    made = {"machine": machine(), "torch": torch.__version__, "date": str(date.today()), "results": results}
    write_whole(path, json.dumps(made, indent=1) + "\n")
    return path
