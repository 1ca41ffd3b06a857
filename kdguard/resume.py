"""What a run that goes on takes over: what is still so. The rest is told, and refused or forgotten."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from kdguard.errors import InputError
from kdguard.guard.budget import WATCHED, WITHIN
from kdguard.guard.kept import STATES
from kdguard.guard.rehearsal import REHEARSAL
from kdguard.guard.warmup import WARM_UP
from kdguard.model.fingerprint import changes, read_fingerprint
from kdguard.report import run as run_folder

_OF_BASE = {"weights", "tokenizer", "template", "quant", "precision"}  # what decides what the base says
_OF_WATCHED = {"probes", "--budget", "--seed"}  # and which probes are watched
_SHAPE = {"architecture", "--rank", "--goal", "--layers"}  # of the adapter


def take_over(out: Path, now: Mapping[str, str], *, allow_changes: bool) -> None:
    """Compare the unfinished run `out` with the fingerprint that it would have `now`.

    Raises InputError for what has changed. With `allow_changes` what it has made wrong is deleted instead: answers of
    the tuned model, and of another base all that it has said.
    """
    was = read_fingerprint(out / run_folder.FINGERPRINT) or {}
    found = changes(was, now)
    if not found:
        return
    anew = f"put it back, or tune anew: kdguard tune --config {out / run_folder.CONFIG} --out ANOTHER"
    if differs := [found[key] for key in found if key in _SHAPE]:
        raise InputError(f"{out}: its adapter cannot be trained on with {', '.join(differs)}", anew)
    if "precision" in found and was["precision"].rpartition(" ")[2] != now["precision"].rpartition(" ")[2]:
        raise InputError(f"{out}: its optimiser is of another device: {found['precision']}", anew)
    if not allow_changes:
        raise InputError(
            f"{out}: what it began with has changed: {', '.join(found.values())}",
            f"put it back, or go on all the same: kdguard tune --resume --allow-changes --out {out}",
        )
    checkpoints = out / run_folder.CHECKPOINTS
    wrong = [*out.glob("*/after.jsonl")]
    if found.keys() & _OF_BASE:
        wrong += [
            *out.glob("*/before.jsonl"),
            checkpoints / REHEARSAL,
            checkpoints / WARM_UP,
            *checkpoints.glob(STATES),
        ]
    if found.keys() & (_OF_BASE | _OF_WATCHED):
        wrong += [checkpoints / WATCHED, *checkpoints.glob(WITHIN.format("*"))]
    for path in wrong:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
