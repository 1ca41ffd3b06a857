"""A budget: the largest forgetting that the person accepts, kept by watching a share of the probes during training.

The watched probes steer; the report is scored on the others, which nothing ever looks at before.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, TypeAdapter
from transformers import TrainerCallback

from kdguard.events import Events
from kdguard.files import read_json, write_whole
from kdguard.guard.teacher import Guard
from kdguard.model.adapter import put_adapter
from kdguard.model.load import save_adapter
from kdguard.model.strength import scale_adapter
from kdguard.probes.watch import Allowance, Settled
from kdguard.processes import by_main

LEAST = 0.5  # of the guard's weight at the start: how far it is driven down
MOST = 24.0  # how far up; where it is heavier still, the lesson is not learned and goes on disturbing
FIRST = 0.25  # of the known probes: from here the path falls to the allowance
STEPS = 20  # of strength, on the way down to where the budget is kept
WATCHED = "watched.json"  # the history
WITHIN = "within-budget-{}"  # the adapter after a step


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: NonNegativeInt
    forgotten: NonNegativeInt
    next_weight: NonNegativeFloat


_HISTORY = TypeAdapter(list[_Entry])


class BudgetKeeper(TrainerCallback):
    """Asks the watched probes after each epoch, drives the guard's weight, and saves the last adapter within it.

    forgotten: asks the watched probes and counts the forgotten ones. folder: where that adapter and the history are
    kept, beside the checkpoints; a run that resumes goes on with them.

    The first epochs forget much that comes back, so the weight does not follow the allowance but a path down to it: a
    geometric one, from FIRST of the known probes at the start. The weight rises when more is forgotten than the path
    has room for: by the square root of how many times as much it is, at most to twice. It shrinks by a quarter when
    less than half of the allowance is forgotten.
    """

    def __init__(
        self, guard: Guard, forgotten: Callable[[], int], allowance: Allowance, folder: Path, events: Events
    ) -> None:
        self.guard, self.forgotten, self.allowance = guard, forgotten, allowance
        self.folder, self.events = folder, events
        self.start = guard.weight
        self.steps = 0
        self.history: list[dict[str, Any]] = []

    def adapter_of(self, entry: dict[str, Any]) -> Path:
        return self.folder / WITHIN.format(entry["step"])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps = state.max_steps
        self.history = by_main(lambda: self._past(state.global_step))
        by_main(self._forget_others)
        if self.history:
            self.guard.weight = self.history[-1]["next_weight"]
        if state.global_step:
            self.on_epoch_end(args, state, control, model)  # which a stop may have come before

    def _past(self, step: int) -> list[dict[str, Any]]:
        path = self.folder / WATCHED
        anew = f"rm {path}; kdguard tune --resume then begins with the guard's first weight"
        past = read_json(path, _HISTORY, "history of a budget", anew) if step and path.exists() else []
        return [entry for entry in past if entry["step"] <= step]

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if state.epoch % 1 < 1e-6:  # the Trainer also says so when Ctrl-C stops it within one
            self.watch(model, state.global_step)

    def watch(self, model: PeftModel, step: int) -> dict[str, Any]:
        """Ask once a step, and return what was found at this one."""
        if self.history and self.history[-1]["step"] == step:
            return self.history[-1]
        forgotten = self.forgotten()
        entry = {"step": step, "forgotten": forgotten, "weight": self.guard.weight}
        self.guard.weight = entry["next_weight"] = self._next_weight(forgotten, step)
        if forgotten <= self.allowance.forgotten:
            save_adapter(model, self.adapter_of(entry))
        self.history.append(entry)
        by_main(lambda: write_whole(self.folder / WATCHED, json.dumps(self.history)))
        by_main(self._forget_others)
        self.events.emit("watched", known=self.allowance.known, **entry)
        return entry

    def _within(self) -> list[dict[str, Any]]:
        return [entry for entry in self.history if entry["forgotten"] <= self.allowance.forgotten]

    def _forget_others(self) -> None:
        """All but the last two within it: a run that is killed before its next checkpoint needs the one before."""
        kept = [self.adapter_of(entry) for entry in self._within()[-2:]]
        for path in self.folder.glob(WITHIN.format("*")):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def last_within(self) -> dict[str, Any] | None:
        """What was found when the last adapter within it was saved, if one was."""
        return next((entry for entry in reversed(self._within()) if self.adapter_of(entry).exists()), None)

    def _next_weight(self, forgotten: int, step: int) -> float:
        weight, end = self.guard.weight, max(self.allowance.forgotten, 1)
        first = max(FIRST * self.allowance.known, end)
        path = first * (end / first) ** (step / self.steps)
        if forgotten > path:
            weight *= min(2.0, (forgotten / path) ** 0.5)
        elif forgotten < self.allowance.forgotten / 2:
            weight *= 0.75
        return min(max(weight, LEAST * self.start), max(MOST, self.start))


def settle(model: PeftModel, keeper: BudgetKeeper, step: int, learned: Callable[[], int]) -> Settled:
    """Bring the adapter of the last `step` within the budget, by its watched probes, and leave the result in `model`.

    When the end is over it there are two ways under it: a lower strength, and the adapter of an earlier epoch. The one
    that has learned more is taken. learned: asks the training questions and counts the right answers.
    """
    allowed = keeper.allowance.forgotten
    forgotten = keeper.watch(model, step)["forgotten"]
    if forgotten <= allowed:
        return Settled(keeper.allowance, 1.0, forgotten, "the end of training was within it")
    ways: list[tuple[int, Settled]] = []
    for turn in range(1, STEPS):
        strength = (STEPS - turn) / STEPS
        keeper.events.emit("progress", phase="settle", done=turn, total=STEPS)
        with rescale_adapter_scale(model, strength):
            forgotten = keeper.forgotten()
            if forgotten <= allowed:
                done = f"the end of training was over it; strength {strength:g} brought it under"
                ways.append((learned(), Settled(keeper.allowance, strength, forgotten, done)))
                break
    end = {name: weight.clone() for name, weight in get_peft_model_state_dict(model).items()}
    earlier = by_main(keeper.last_within)
    if earlier:
        put_adapter(model, keeper.adapter_of(earlier), model.active_adapter)
        done = f"the end of training was over it; the adapter of step {earlier['step']:,} was kept"
        ways.append((learned(), Settled(keeper.allowance, 1.0, earlier["forgotten"], done)))
    if not ways:
        done = f"it was over it at every strength down to {strength:g}, which was kept"
        ways.append((0, Settled(keeper.allowance, strength, forgotten, done)))
    chosen = max(ways, key=lambda way: way[0])[1]
    if chosen.strength < 1:
        set_peft_model_state_dict(model, end)
        scale_adapter(model, chosen.strength)
    return chosen
