"""Checkpoints that are whole or not there, with all that the rest of a run depends on.

transformers writes a checkpoint into its place, file by file, and takes the one with the highest number, whole or not.
Here it is written beside and renamed; its last file, WHOLE, lists the others.
"""

import errno
import json
import os
import random
import shutil
from dataclasses import asdict
from itertools import filterfalse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from kdguard.errors import KdguardError
from kdguard.files import put_in_place, telling_full_disk, write_whole
from kdguard.guard.kept import KeptStates
from kdguard.guard.lean import Lean
from kdguard.processes import by_main

WHOLE = "whole.json"
_BESIDE = ".writing"


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; None where there is none.

    One that was to take another's place, and was killed before it did, gives it back.
    """
    for before in folder.glob(f".{PREFIX_CHECKPOINT_DIR}-*.old"):
        place = folder / before.stem.removeprefix(".")
        if place.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(place)
    return max(filter(_is_whole, _checkpoints(folder)), key=_step_of, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _is_torn(checkpoint: Path) -> bool:
    """Whether it was whole once; one of transformers' own has no list of its files."""
    return (checkpoint / WHOLE).is_file() and not _is_whole(checkpoint)


class SafeTrainer(Trainer):
    """What of `GuardedTrainer` deals with checkpoints.

    A run that goes on from one is the run that was never stopped: beside what transformers keeps, `Lean`, the kept
    states of the teacher and the random numbers as they were after the last whole optimiser step are in it.
    """

    kept: KeptStates | None = None
    lean: Lean

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._beside: Path | None = None  # while a checkpoint is being written, where
        self._random = _random_states()
        self.add_callback(_AfterStep(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            folder = self.args.output_dir
            resume_from_checkpoint = str(last_whole(Path(folder)) or get_last_checkpoint(folder) or "") or True
        if isinstance(resume_from_checkpoint, str):
            if _is_torn(Path(resume_from_checkpoint)):
                raise KdguardError(
                    f"{resume_from_checkpoint}: this checkpoint is damaged, and none before it is whole",
                    "train anew, in another output_dir",
                )
            self._restore(Path(resume_from_checkpoint))
        by_main(self._make_room)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_last_step(self) -> str:
        """Save a checkpoint of the last whole optimiser step, from wherever in the next one: its name, or nothing."""
        if not self.state.global_step or self.args.save_strategy == "no" or self.is_deepspeed_enabled:
            return ""  # DeepSpeed's optimiser has stepped within backward
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if not _is_whole(folder):
            _set_random_states(self._random)
            self._save_checkpoint(self.model, trial=None)
        return folder.name

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._beside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        beside = folder / _BESIDE / final.name
        main = self.accelerator.is_main_process
        with telling_full_disk(final):
            if main:
                shutil.rmtree(folder / _BESIDE, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._beside = folder / _BESIDE
            try:
                super()._save_checkpoint(model, trial)
                if self.kept:
                    self.kept.save(beside)
                self.accelerator.wait_for_everyone()
                if main:
                    self._finish(beside, final)
            finally:
                self._beside = None
                if main:
                    shutil.rmtree(folder / _BESIDE, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _finish(self, beside: Path, final: Path) -> None:
        if self.state.best_global_step == self.state.global_step:  # where it is to be, and not where it was written
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(beside / TRAINER_STATE_NAME))
        files = [path for path in beside.rglob("*") if path.is_file()]
        sizes = {path.relative_to(beside).as_posix(): path.stat().st_size for path in files}
        write_whole(beside / WHOLE, json.dumps({"lean": asdict(self.lean), "files": sizes}))
        put_in_place(beside, final)
        if self.args.save_total_limit:
            found = _checkpoints(final.parent)
            newest = sorted(filterfalse(_is_torn, found), key=_step_of)[-self.args.save_total_limit :]
            for path in set(found) - set(newest):
                if _is_torn(path) or _step_of(path) != self.state.best_global_step:
                    shutil.rmtree(path, ignore_errors=True)

    def _restore(self, checkpoint: Path) -> None:
        """What transformers does not restore itself."""
        if self.kept:
            self.kept.resume(checkpoint)
        if (checkpoint / WHOLE).is_file():
            for key, value in json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))["lean"].items():
                setattr(self.lean, key, value)

    def _make_room(self) -> None:
        """Find out before the first step whether the disk has room for all checkpoints that will be there at once.

        Raises KdguardError where it has not.
        """
        limit = self.args.save_total_limit
        if self.args.save_strategy == "no" or not limit:
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / _BESIDE, ignore_errors=True)  # of a process that was killed
        there = sum(map(_is_whole, _checkpoints(folder)))
        need = self.room_for_checkpoints(limit + 2 - there)  # the best one, and one that is being written
        trial = folder / ".room"
        try:
            with open(trial, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, max(1, need))
                elif shutil.disk_usage(folder).free < need:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise KdguardError(
                f"{folder}: the checkpoints need {need / 1e6:,.0f} MB: {error.strerror}, "
                f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free",
                "free some space, or take --out on another disk or a smaller --rank",
            ) from None
        finally:
            trial.unlink(missing_ok=True)

    def room_for_checkpoints(self, n: int) -> int:
        """Bytes: the adapter, two moments of the optimiser for each of its weights, and the log of all steps."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        moment = 1 if "8bit" in str(self.args.optim) else 4
        rows = len(self.train_dataset) * self.args.num_train_epochs
        log = 512 * rows / (self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps)
        each = sum(weight.nbytes + 2 * moment * weight.numel() for weight in trained) + int(log) + 2**20
        return max(0, n) * each


class _AfterStep(TrainerCallback):
    """Notes what there was after each step, of what the next one may change before it is whole."""

    def __init__(self, trainer: SafeTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._random = _random_states()
        if self.trainer.kept:
            self.trainer.kept.of_step.clear()


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
