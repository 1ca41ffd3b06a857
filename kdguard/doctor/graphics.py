"""Is there a GPU, who holds its memory, and do its driver and torch fit each other?"""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdguard.doctor.check import WARNING, WRONG, Check
from kdguard.doctor.machine import in_wsl, unset
from kdguard.doctor.trial import Trial
from kdguard.errors import KdguardError
from kdguard.gpu import DRIVERS, GPU, Process, cuda_version, gpus, processes, version

BUSY = 0.2  # of a GPU's memory in use, from which it is worth a warning
# What torch 2.12 to 2.14 are built for: the driver's CUDA, and GPUs from and to (RELEASE.md of pytorch/pytorch).
# A build for 12.6 runs on every driver for CUDA 12 or newer, one for 13.0 on every driver for CUDA 13 or newer.
BUILDS = {"cu130": ((13, 0), (7, 5), (99, 0)), "cu126": ((12, 0), (5, 0), (9, 0))}
INDEX = "https://download.pytorch.org/whl"
NF4_CAPABILITY = (6, 0)  # bitsandbytes' own wheels
BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi tells. cuda: the newest that it runs. trouble: why it does not tell."""

    gpus: Sequence[GPU] = ()
    cuda: tuple[int, int] | None = None
    processes: dict[str, list[Process]] = field(default_factory=dict)
    trouble: KdguardError | None = None


def ask_driver() -> Driver:
    try:
        found = gpus()
        return Driver(found, cuda_version(), processes()) if found else Driver()
    except KdguardError as trouble:
        return Driver(trouble=trouble)


def graphics(driver: Driver, trial: Trial) -> list[Check]:
    """Each GPU, its memory and who holds it."""
    if driver.trouble:
        return [Check("GPU", driver.trouble.message, WRONG, driver.trouble.hint)]
    if not driver.gpus and trial.devices:
        names = ", ".join(device["name"] for device in trial.devices)
        return [Check("GPU", f"{names}; how much memory is free is not known without nvidia-smi")]
    if not driver.gpus:
        return [
            Check(
                "GPU",
                "no NVIDIA GPU was found: everything runs on the CPU, which is enough for the demo and small models",
                WARNING,
                f"if there is one, install its driver: {DRIVERS}",
            )
        ]
    used = trial.devices[0]["uuid"] if trial.devices else None
    several = len(driver.gpus) > 1
    return [
        graphics_card(
            f"GPU {i}" if several else "GPU",
            gpu,
            gpu.name + (" (runs use this one)" if several and gpu.uuid == used else ""),
            driver.processes.get(gpu.uuid, []),
            state_if_old=WARNING if several and gpu.uuid != used else WRONG,
        )
        for i, gpu in enumerate(driver.gpus)
    ]


def graphics_card(what: str, gpu: GPU, name: str, holders: Sequence[Process], *, state_if_old: str) -> Check:
    said = [name]
    if gpu.capability:
        said.append(f"compute capability {dotted(gpu.capability)}")
    if gpu.capability and gpu.capability < NF4_CAPABILITY:
        said.append(f"too old for 4-bit, which begins at {dotted(NF4_CAPABILITY)}")
        return Check(what, ", ".join(said), state_if_old, "hide it with CUDA_VISIBLE_DEVICES; -1 leaves the CPU alone")
    if gpu.total is None or gpu.free is None:
        return Check(what, ", ".join([*said, "no memory of its own"]))
    taken = gpu.total - gpu.free
    said.append(f"{gpu.free:.1f} of {gpu.total:.1f} GiB free")
    known = sorted((holder for holder in holders if holder.gib), key=lambda holder: -(holder.gib or 0))
    said += [f"{holder.name} (process {holder.pid}) holds {holder.gib:.1f} GiB" for holder in known]
    rest = taken - sum(holder.gib or 0 for holder in known)
    if rest > 0.1:
        said.append(f"{'the display and the driver' if gpu.display else 'the driver and others'} {rest:.1f} GiB")
    if taken < BUSY * gpu.total:
        return Check(what, ", ".join(said))
    mend = (
        f"end {' and '.join(f'{holder.name} (process {holder.pid})' for holder in known)} before a run"
        if known
        else "close programs that use the GPU; `nvidia-smi` lists them"
    )
    return Check(what, ", ".join(said), WARNING, mend)


def driver_check(driver: Driver, trial: Trial) -> list[Check]:
    """Is the driver new enough for any torch of today?"""
    if not driver.gpus:
        return []
    said = driver.gpus[0].driver + (f", for CUDA up to {dotted(driver.cuda)}" if driver.cuda else "")
    if driver.cuda and not trial.devices and not build(driver):
        return [Check("driver", f"{said}: too old for the GPU builds of torch", WRONG, new_driver())]
    return [Check("driver", said)]


def new_driver() -> str:
    if in_wsl():
        return f"install driver 580 or newer in Windows, none in WSL: {DRIVERS}"
    ubuntu = "; on Ubuntu: sudo ubuntu-drivers install" if platform.system() == "Linux" else ""
    return f"install driver 580 or newer: {DRIVERS}{ubuntu}"


def build(driver: Driver) -> str | None:
    """The build of torch for this driver and its best GPU; None where there is none."""
    best = max((gpu.capability for gpu in driver.gpus if gpu.capability), default=None)
    for name, (cuda, oldest, newest) in BUILDS.items():
        if (driver.cuda or cuda) >= cuda and oldest <= (best or oldest) <= newest:
            return name
    return None


def reinstall_torch(driver: Driver) -> str:
    command = "pip install --force-reinstall torch"
    if driver.gpus or driver.trouble:
        return f"{command} --index-url {INDEX}/{build(driver) or next(iter(BUILDS))}"
    return f"{command} --index-url {INDEX}/cpu" if platform.system() == "Linux" else command


def torch_check(driver: Driver, trial: Trial) -> Check:
    """Can torch be imported, does its CUDA fit the driver, and is it built for the GPU?"""
    again = reinstall_torch(driver)
    if trial.failed == "torch":
        if platform.system() == "Windows" and trial.module != "torch":
            again += "; and the Visual C++ runtime: https://aka.ms/vs/17/release/vc_redist.x64.exe"
        return Check("torch", f"cannot be imported: {trial.error}", WRONG, again)
    found = trial.torch
    said = found["version"]
    if found["hip"]:
        return Check("torch", f"{said}, for AMD GPUs, on which kdguard has not been tried yet", WARNING, "kdguard demo")
    if not driver.gpus and not trial.devices:
        return Check("torch", f"{said}, on the CPU")
    if not found["cuda"]:
        return Check("torch", f"{said} is a build without CUDA: the GPU is not used", WRONG, again)
    said += "" if "+cu" in said else f", for CUDA {found['cuda']}"
    if not trial.devices:
        return Check("torch", *unusable(said, driver, trial))
    first = trial.devices[0]
    capability = (first["capability"][0], first["capability"][1])
    said += f", on {first['name']}"
    if not runs_on(capability, found["architectures"]):
        return Check(
            "torch", f"{said}, for whose compute capability {dotted(capability)} it is not built", WRONG, again
        )
    if capability < BF16_CAPABILITY:
        return Check(
            "torch", f"{said}, which has no bf16: fp16 is used", WARNING, "a lower --lr if a loss is not finite"
        )
    return Check("torch", f"{said}, in bf16")


def unusable(said: str, driver: Driver, trial: Trial) -> tuple[str, str, str]:
    """Why torch does not use the GPU that is there, and what mends it."""
    needs = version(trial.torch["cuda"])
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver.cuda and needs and driver.cuda[0] < needs[0]:
        mend = reinstall_torch(driver) if build(driver) else new_driver()
        return f"{said}, which is newer than the driver: it runs CUDA up to {dotted(driver.cuda)}", WRONG, mend
    why = trial.torch.get("unusable", "it does not say why")
    if hidden is not None and "No CUDA GPUs are available" in why:
        return f"{said}; CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU", WARNING, unset("CUDA_VISIBLE_DEVICES")
    return f"{said}, cannot use the GPU: {why}", WRONG, new_driver()


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Machine code runs within its major capability, from its minor on; PTX on all newer GPUs."""
    for name in architectures:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name):
            built = (int(match[2]), int(match[3]))
            if built <= capability and (match[1] == "compute" or built[0] == capability[0]):
                return True
    return False


def dotted(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"
