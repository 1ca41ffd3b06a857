"""How a run is getting on, from its events: the phase, how far it is, the time left, what was measured."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from kdguard.events import Event
from kdguard.terminal import PHASES

_RECENT = 50  # steps from which the speed is told


@dataclass
class Progress:
    """done of total: steps while training, questions or rows in other phases. seconds_left: of this phase."""

    phase: str = "starting"
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    losses: list[Event] = field(default_factory=list)
    sampled: list[Event] = field(default_factory=list)
    answers: list[Event] = field(default_factory=list)
    leaner: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def in_words(self) -> str:
        return PHASES.get(self.phase, self.phase)


def progress(events: Sequence[Event]) -> Progress:
    """Where the events end. A resumed run comes to some steps again: what is told last of a step counts."""
    told: dict[str, dict[Any, Event]] = {"loss": {}, "sampled": {}, "answers": {}}
    found = Progress()
    began = started = 0.0
    for event in events:
        kind = event["event"]
        if kind in told:
            told[kind][event["step"] if "step" in event else (event["of"], event["when"])] = event
        if kind == "process":
            found.phase, found.done, found.total, began = "starting", 0, 0, event["time"]
            started = event["time"]
        elif kind == "warning" and event["what"] not in found.warnings:  # a resumed run warns again
            found.warnings.append(event["what"])
        elif kind == "leaner":
            found.leaner.append(event["what"])
        elif kind == "phase":
            found.phase, found.done, found.total, began = event["name"], 0, 0, event["time"]
        elif kind == "progress":
            found.phase, found.done, found.total = event["phase"], event["done"], event["total"]
        elif kind == "loss":
            found.phase, found.done, found.total = "train", event["step"], event["steps"]
    found.losses, found.sampled, found.answers = (list(each.values()) for each in told.values())
    recent = [event["time"] for event in found.losses if event["time"] >= started][-_RECENT:]
    if found.phase == "train" and len(recent) > 1:
        pace = median(b - a for a, b in pairwise(recent))
        found.seconds_left = pace * (found.total - found.done)
    elif found.phase != "train" and found.done:
        found.seconds_left = (time.time() - began) / found.done * (found.total - found.done)
    return found
