"""Try out what a run needs, in a process of its own, which a broken library may take down with it.

Each step that the process reaches is a line of JSON: `step` and what it found, or its `error`, after which there are no
more.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SECONDS = 120  # that all steps may take; 6 on two slow cores, more from a disk that has not read the libraries yet
FARTHEST = 0.2  # from the plain product, as a share of its norm; NF4's own rounding is about 0.1


@dataclass(frozen=True)
class Trial:
    """What was found, by step; `failed` is the step that it did not get past, and why."""

    found: dict[str, dict[str, Any]]
    failed: str | None = None
    error: str = ""
    module: str | None = None  # that could not be imported

    @property
    def torch(self) -> dict[str, Any]:
        return self.found.get("torch", {})

    @property
    def devices(self) -> list[dict[str, Any]]:
        """The GPUs that torch can use; a run takes the first."""
        return list(self.torch.get("devices", ()))


def try_out() -> Trial:
    """Run the steps in a process that sees the same modules as this one."""
    command = [sys.executable, "-P", "-c", "from kdguard.doctor.trial import main; main()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    end = ""
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=SECONDS)
        said, last = done.stdout, done.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        how = f"exit code {done.returncode}" if done.returncode >= 0 else signal.Signals(-done.returncode).name
        end = f"it crashed with {how}" + (f": {last[:200]}" if last else "")
    except subprocess.TimeoutExpired as slow:
        said, end = slow.stdout or b"", f"it took more than {SECONDS} s"
    found: dict[str, dict[str, Any]] = {}
    for line in said.decode(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a library's own words, or a line that was cut short
            values = json.loads(line)
            if isinstance(values, dict) and "step" in values:
                found[values.pop("step")] = values
    for step, values in found.items():
        if "error" in values:
            return Trial(found, step, values["error"], values["module"])
    return Trial(found, next((step for step in STEPS if step not in found), None), end)


def try_torch() -> dict[str, Any]:
    import torch

    usable = torch.cuda.is_available()
    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    found["architectures"] = torch.cuda.get_arch_list() if usable else []
    found["devices"] = [
        {"name": gpu.name, "capability": [gpu.major, gpu.minor], "uuid": f"GPU-{getattr(gpu, 'uuid', '')}"}
        for gpu in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if usable else 0))
    ]
    if torch.version.cuda and not usable:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            found["unusable"] = in_short(error)
    return found


def try_bitsandbytes() -> dict[str, Any]:
    import bitsandbytes

    return {"version": bitsandbytes.__version__}


def try_libraries() -> dict[str, Any]:
    """Everything that a run imports."""
    import kdguard.tuning  # noqa: F401

    return {}


def try_nf4() -> dict[str, Any]:
    """Forward and backward through one 4-bit layer, and on a GPU a step of the optimiser, as a run has them."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.optim import PagedAdamW8bit

    from kdguard.model.load import compute_dtype, device

    torch.manual_seed(0)
    weight, rows, gradient = torch.randn(128, 256), torch.randn(8, 256), torch.randn(8, 128)
    layer = Linear4bit(256, 128, bias=False, compute_dtype=compute_dtype(), quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(device())
    inputs = rows.to(device(), compute_dtype()).requires_grad_()
    outputs = layer(inputs)
    outputs.backward(gradient.to(outputs))
    assert inputs.grad is not None
    plain = {"forward": (outputs, rows @ weight.T), "backward": (inputs.grad, gradient @ weight)}
    away = {}
    for name, (found, right) in plain.items():
        away[name] = ((found.detach().float().cpu() - right).norm() / right.norm()).item()
        if not away[name] < FARTHEST:  # NaN too
            raise ArithmeticError(f"the {name} pass of a 4-bit layer is {away[name]:.0%} away from the plain product")
    if device().type == "cuda":
        adapter = torch.nn.Parameter(torch.zeros(2**17, device=device()))  # smaller ones are not paged
        adapter.grad = torch.ones_like(adapter)
        PagedAdamW8bit([adapter]).step()
        if not adapter.isfinite().all() or not adapter.all():
            raise ArithmeticError("a step of the paged 8-bit optimiser did not move the adapter as it should")
    return {"device": device().type, "dtype": str(compute_dtype()).removeprefix("torch."), **away}


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": try_torch,
    "bitsandbytes": try_bitsandbytes,
    "libraries": try_libraries,
    "nf4": try_nf4,
}


def in_short(error: Exception) -> str:
    """Its kind and its first line: libraries write whole pages."""
    first = next(filter(None, map(str.strip, str(error).splitlines())), "")
    return f"{type(error).__name__}: {first[:200]}"


def main() -> None:
    for step, attempt in STEPS.items():
        try:
            print(json.dumps({"step": step, **attempt()}), flush=True)
        except Exception as error:
            missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
            print(json.dumps({"step": step, "error": in_short(error), "module": missing}), flush=True)
            return
