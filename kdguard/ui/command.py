"""What was chosen on the page, as `kdguard tune` takes it: checked before anything starts, and shown to be copied."""

import functools
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdguard.config import BEST, TuneConfig, presets
from kdguard.errors import InputError
from kdguard.ui.pack import PACK
from kdguard.ui.studio import Studio

NO_BUDGET = "none"
OWN = "your own"
SETTINGS = (
    *("model", "goal", "budget", "guard", "control"),
    *("epochs", "lr", "rank", "max_length", "batch_size", "seed", "probes"),
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def models(studio: Studio) -> list[str]:
    """What can be tuned: every preset, and the models of the runs that are here."""
    shipped = presets()
    known = {preset["model"] for preset in shipped.values()}
    others = {str(studio.config(name)["model"]) for name in studio.names() if studio.config(name).get("model")}
    return [*shipped, *sorted(others - known)]


def first_model() -> str:
    """The preset that a newcomer sees: the embedded model where there is no NVIDIA driver."""
    return BEST[0] if shutil.which("nvidia-smi") else "demo"


def flags(studio: Studio, data: Path | None, values: Sequence[Any]) -> dict[str, Any]:
    """The flags of a run on `data` with the values of SETTINGS: those that were left alone are left out.

    Raises InputError for a model that only a path names, and for an own pack that is empty.
    """
    chosen = {key: value for key, value in zip(SETTINGS, values, strict=True) if value not in (None, "", [])}
    model = str(chosen.pop("model", first_model()))
    if model not in models(studio) and (Path(model).exists() or not _HUB_ID.fullmatch(model)):
        raise InputError(
            f"{model}: neither a preset nor a model of the hub",
            "the page takes OWNER/NAME; for a folder of yours: kdguard tune DATA --model FOLDER",
        )
    left_alone = {"goal": "facts", "budget": NO_BUDGET, "guard": True, "control": False}
    found = {key: value for key, value in chosen.items() if value != left_alone.get(key)}
    pack = studio.root / PACK
    if OWN in found.get("probes", ()) and not pack.is_file():
        raise InputError("your own pack holds no probes yet", "make a question one in the Ask tab")
    if "probes" in found:
        found["probes"] = [str(pack) if each == OWN else each for each in found["probes"]]
    if found.get("control") and "guard" in found:
        raise InputError("the unguarded twin is this run itself", "switch the guard on, or the twin off")
    named = {"preset": model} if model in presets() else {"model": model}
    return {"data": [str(data)] if data else None, **named, **found}


def arguments(flags: dict[str, Any], out: Path) -> list[str]:
    """The same as the command line has them."""
    found = ["tune", *(flags["data"] or ["DATA"])]
    for key, value in flags.items():
        name = f"--{key.replace('_', '-')}"
        if key == "probes":
            found += [word for pack in value for word in (name, pack)]
        elif key == "guard":
            found.append("--no-guard")
        elif key == "control":
            found.append(name)
        elif key != "data":
            found += [name, str(value)]
    return [*found, "--out", str(out)]


def typed(words: Sequence[str]) -> str:
    """The command as one would type it here."""
    here = Path.cwd()

    def short(word: str) -> str:
        path = Path(word)
        return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else word

    return shlex.join(["kdguard", *map(short, words)])


@functools.lru_cache(maxsize=32)
def needed_gib(config: str) -> float | None:
    """The peak of a run with this config, as JSON, here. Cached, for every key that is typed asks for it."""
    from kdguard import fit

    wanted = TuneConfig.model_validate_json(config)
    return fit.needed_gib(wanted, fit.config_of(wanted), wanted.max_length)
