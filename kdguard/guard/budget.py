"""A budget: the largest forgetting that the person accepts, kept by watching a share of the probes during training.

The watched probes steer; the report is scored on the others, which nothing ever looks at before.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from transformers import TrainerCallback

from kdguard.events import Events
from kdguard.files import write_whole
from kdguard.guard.teacher import Guard
from kdguard.model.strength import STRENGTHS, scale_adapter
from kdguard.probes.watch import Allowance, Settled

LEAST, MOST = 0.5, 8.0  # how far the guard's weight is driven, as factors of the one it starts with


class BudgetKeeper(TrainerCallback):
    """Asks the watched probes after each epoch, drives the guard's weight, and saves the best adapter within budget.

    forgotten: asks the watched probes and counts the forgotten ones. folder: where the adapter (`within-budget`) and
    the history (`watched.json`) are kept; a run that resumes goes on with them.

    The weight doubles when more is forgotten than the allowance and shrinks by a quarter when at most half of it is.
    """

    def __init__(
        self, guard: Guard, forgotten: Callable[[], int], allowance: Allowance, folder: Path, events: Events
    ) -> None:
        self.guard, self.forgotten, self.allowance = guard, forgotten, allowance
        self.folder, self.events = folder, events
        self.start = guard.weight
        self.history: list[dict[str, Any]] = []

    @property
    def best(self) -> Path:
        return self.folder / "within-budget"

    @property
    def best_entry(self) -> dict[str, Any]:
        """The epoch whose adapter is in `best`: of those within the budget the one with the lowest cross-entropy."""
        within = [entry for entry in self.history if entry["forgotten"] <= self.allowance.forgotten]
        return min(within, key=lambda entry: entry["ce"])

    def on_train_begin(self, args, state, control, **kwargs):
        path = self.folder / "watched.json"
        if state.global_step and path.exists():
            past = json.loads(path.read_text(encoding="utf-8"))
            self.history = [entry for entry in past if entry["step"] <= state.global_step]
            if self.history:
                self.guard.weight = self.history[-1]["next_weight"]

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if state.epoch % 1 > 1e-6:
            return  # Ctrl-C in the middle of an epoch: the resumed run asks at its end
        forgotten = self.forgotten()
        since = self.history[-1]["step"] if self.history else 0
        losses = [entry["ce"] for entry in state.log_history if "ce" in entry and entry["step"] > since]
        entry = {
            "step": state.global_step,
            "forgotten": forgotten,
            "ce": sum(losses) / max(len(losses), 1),
            "weight": self.guard.weight,
            "next_weight": self._next_weight(forgotten),
        }
        self.history.append(entry)
        if forgotten <= self.allowance.forgotten and self.best_entry is entry:
            model.save_pretrained(self.best, selected_adapters=[model.active_adapter])
        self.guard.weight = entry["next_weight"]
        write_whole(self.folder / "watched.json", json.dumps(self.history))
        self.events.emit("watched", known=self.allowance.known, **entry)

    def _next_weight(self, forgotten: int) -> float:
        weight = self.guard.weight
        if forgotten > self.allowance.forgotten:
            weight *= 2
        elif forgotten <= self.allowance.forgotten / 2:
            weight *= 0.75
        return min(max(weight, LEAST * self.start), MOST * self.start)


def settle(model: PeftModel, keeper: BudgetKeeper, learned: Callable[[], int]) -> Settled:
    """Bring the trained adapter within the budget, by its watched probes, and leave the better one in `model`.

    When the end is over it there are two ways under it: a lower strength, and the best adapter of an earlier epoch.
    The one that has learned more is taken. learned: asks the training questions and counts the right answers.
    """
    allowed = keeper.allowance.forgotten
    forgotten = keeper.history[-1]["forgotten"]
    if forgotten <= allowed:
        return Settled(keeper.allowance, 1.0, forgotten, "the end of training was within it")
    ways: list[tuple[int, float, Settled]] = []
    strength = 1.0
    for strength in STRENGTHS[-2:0:-1]:
        with rescale_adapter_scale(model, strength):
            forgotten = keeper.forgotten()
            if forgotten <= allowed:
                done = f"the end of training was over it; strength {strength:g} brought it under"
                ways.append((learned(), strength, Settled(keeper.allowance, strength, forgotten, done)))
                break
    if keeper.best.exists():
        end = get_peft_model_state_dict(model)
        end = {name: weight.clone() for name, weight in end.items()}
        best = keeper.best_entry
        model.load_adapter(keeper.best, model.active_adapter, is_trainable=True)
        done = f"the end of training was over it; the adapter of step {best['step']:,} was kept"
        ways.append((learned(), 1.0, Settled(keeper.allowance, 1.0, best["forgotten"], done)))
        if max(ways, key=lambda way: way[:2])[2].strength < 1:
            set_peft_model_state_dict(model, end)
    if not ways:
        done = f"it was over it at every strength down to {strength:g}, which was kept"
        ways.append((0, strength, Settled(keeper.allowance, strength, forgotten, done)))
    chosen = max(ways, key=lambda way: way[:2])[2]
    if chosen.strength < 1:
        scale_adapter(model, chosen.strength)
    return chosen
