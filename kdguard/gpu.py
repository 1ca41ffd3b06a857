"""NVIDIA GPUs as nvidia-smi tells of them: torch would take some hundred MB of a GPU to look at it."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from kdguard.errors import KdguardError

SECONDS = 10  # that nvidia-smi is waited for
SMALL = 0.2  # GiB that are not worth a word
DRIVERS = "https://www.nvidia.com/drivers"
_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)")  # drivers from 610 on say UMD


@dataclass(frozen=True)
class Process:
    """A program that computes on a GPU. gib: what it holds; None where the driver does not tell, as on Windows."""

    pid: int
    name: str
    gib: float | None


@dataclass(frozen=True)
class GPU:
    """One GPU. total, free: GiB, None where it has no memory of its own. capability: None from very old drivers."""

    uuid: str
    name: str
    driver: str
    total: float | None
    free: float | None
    display: bool
    capability: tuple[int, int] | None


def gpus() -> list[GPU]:
    """The NVIDIA GPUs of this computer; none where there is no driver.

    Raises KdguardError when nvidia-smi is there and does not answer.
    """
    fields = ["uuid", "driver_version", "memory.total", "memory.free", "display_active", "compute_cap", "name"]
    try:
        rows = _query("gpu", fields)
    except KdguardError as error:
        if "compute_cap" not in error.message:
            raise
        fields.remove("compute_cap")
        rows = _query("gpu", fields)
    return [
        GPU(
            uuid=row["uuid"],
            name=row["name"],
            driver=row["driver_version"],
            total=_gib(row["memory.total"]),
            free=_gib(row["memory.free"]),
            display=row["display_active"] == "Enabled",
            capability=version(row.get("compute_cap", "")),
        )
        for row in rows
    ]


def processes() -> dict[str, list[Process]]:
    """What computes on the GPUs, by their uuid. Raises KdguardError as `gpus` does."""
    found: dict[str, list[Process]] = {}
    for row in _query("compute-apps", ["gpu_uuid", "pid", "used_memory", "process_name"]):
        if not row["pid"].isdecimal():  # not allowed to see it
            continue
        name = row["process_name"].replace("\\", "/").rsplit("/", 1)[-1]
        found.setdefault(row["gpu_uuid"], []).append(Process(int(row["pid"]), name, _gib(row["used_memory"])))
    return found


def others(uuid: str | None = None) -> list[str]:
    """Other programs that hold SMALL or more of the GPU, in words; of all GPUs without a uuid.

    To be asked before this one holds any: in a container it does not know itself by its number. What nvidia-smi cannot
    tell is left out; `kdguard doctor` says why.
    """
    try:
        found = processes()
    except KdguardError:
        return []
    return [
        f"{each.name} (process {each.pid}) holds {each.gib:.1f} GiB of the GPU"
        for gpu, there in found.items()
        if uuid in (None, gpu)
        for each in there
        if each.gib and each.gib >= SMALL and each.pid != os.getpid()
    ]


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs. Raises KdguardError as `gpus` does."""
    said = _CUDA.search(_ask() or "")
    return (int(said[1]), int(said[2])) if said else None


def version(text: str) -> tuple[int, int] | None:
    """The first two numbers of a version: `8.9` is (8, 9)."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def _query(what: str, fields: list[str]) -> list[dict[str, str]]:
    """A row for each GPU or process. The last field may have commas in it."""
    answer = _ask(f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits") or ""
    values = [line.split(", ", len(fields) - 1) for line in answer.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in values if len(row) == len(fields)]


def _ask(*arguments: str) -> str | None:
    command = shutil.which("nvidia-smi")
    if not command:
        return None
    try:
        done = subprocess.run(
            [command, *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise KdguardError(f"nvidia-smi did not answer within {SECONDS} s", "restart the computer") from None
    except OSError as error:
        raise KdguardError(f"nvidia-smi could not be started ({error})", f"install the driver: {DRIVERS}") from None
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode and not (said and said[0].startswith("No devices were found")):
        raise KdguardError(
            f"nvidia-smi failed: {said[0] if said else f'exit code {done.returncode}'}",
            f"restart the computer; if that does not help, install the driver again: {DRIVERS}",
        )
    return done.stdout


def _gib(mib: str) -> float | None:
    return float(mib) / 1024 if mib.replace(".", "", 1).isdecimal() else None
