"""Python, the system, room on the disks, memory and the hub."""

import os
import platform
import shutil
import sys
from pathlib import Path

from kdguard.doctor.check import WARNING, WRONG, Check

PYTHON = (3, 11)
DOWNLOAD, RUN, FULL = 16e9, 5e9, 1e9  # bytes: 7 to 9 billion 16-bit weights; adapter, checkpoints and kept states
MEMORY = 8 * 2**30  # bytes free; more is seldom needed, for weights are mapped from their files
HUB_SECONDS = 3


def python() -> Check:
    mine = sys.version_info[:3]
    said = ".".join(map(str, mine))
    conda = os.environ.get("CONDA_PREFIX")
    if sys.prefix != sys.base_prefix or conda:
        said += f" in the environment {conda or sys.prefix}"
    else:
        said += f" of the system ({sys.executable}), in no virtual environment"
    if mine < PYTHON:
        return Check("Python", said, WRONG, "install Python 3.11 or newer, then: python3 -m venv .venv")
    return Check("Python", said)


def system() -> Check:
    name = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() == "Linux":
        return Check("system", name + (", in WSL" if in_wsl() else ""))
    if platform.system() == "Windows":
        return Check(
            "system",
            f"{name}: NVIDIA GPUs are supported; kdguard has only been run on Linux yet",
            WARNING,
            "if something fails that is not named here, run it in WSL: wsl --install",
        )
    if platform.system() == "Darwin":
        return Check(
            "system",
            f"{name}: on the CPU alone, for Apple's GPU is not used; kdguard has only been run on Linux yet",
            WARNING,
            "kdguard demo, or small models with --quant none",
        )
    return Check("system", f"{name}: kdguard is for Linux, Windows and macOS", WARNING, "kdguard demo")


def in_wsl() -> bool:
    return "microsoft" in platform.release().lower()


def disks() -> list[Check]:
    """Room for models, where the hub library keeps them, and for runs, in the working directory."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE as cache
    except ImportError:
        cache = os.path.join(os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")), "hub")
    clear = "`hf cache ls`, then `hf cache rm REPO`; or HF_HOME=FOLDER, on a larger disk, in the environment"
    return [
        disk("models", Path(cache), DOWNLOAD, "a model of 7 to 9 B is a download of", clear),
        disk("runs", Path("runs"), RUN, "a run may write", "kdguard tune --out FOLDER, on a larger disk"),
    ]


def disk(what: str, folder: Path, needs: float, why: str, mend: str) -> Check:
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    said = f"{free / 1e9:.1f} GB free at {folder.resolve()}"
    if not os.access(there, os.W_OK):
        return Check(what, f"{said}, where nothing may be written", WRONG, mend)
    if free >= needs:
        return Check(what, said)
    return Check(what, f"{said}; {why} {needs / 1e9:.0f} GB", WRONG if free < FULL else WARNING, mend)


def memory() -> Check:
    import psutil

    found = psutil.virtual_memory()
    said = f"{found.available / 2**30:.1f} of {found.total / 2**30:.1f} GiB free"
    if found.available >= MEMORY:
        return Check("memory", said)
    return Check("memory", f"{said}, which may not be enough to load a model", WARNING, "close other programs")


def hub() -> Check:
    """Is there a token, and can the hub be reached?"""
    from huggingface_hub import get_session, get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    login = "a token is there" if get_token() else "no token: models with terms, such as Llama, need `hf auth login`"
    if HF_HUB_OFFLINE:
        return Check("hub", f"not asked, for HF_HUB_OFFLINE is set: only models on this computer can be used; {login}")
    try:
        get_session().head(ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # whatever the hub's HTTP library raises in this version
        return Check(
            "hub",
            f"{ENDPOINT} cannot be reached ({type(error).__name__}); {login}",
            WARNING,
            "--model FOLDER or demo works without it; behind a proxy, set HTTPS_PROXY",
        )
    return Check("hub", f"{ENDPOINT} can be reached; {login}")


def unset(variable: str) -> str:
    return f"set {variable}=" if platform.system() == "Windows" else f"unset {variable}"
