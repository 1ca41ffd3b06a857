"""One stream of events for a run: the terminal, the page and `events.jsonl` all read it.

An event is a dict with `event` and `time` (seconds since the epoch, UTC) and the keys of its kind:

    phase      name                        a phase begins; `done` when it ends
    process    pid, host                   who works on the run from here on: the last one named does
    progress   phase, done, total          items of the phase so far; in the file at most one a second
    loss       step, steps, epoch, ce, kl, lr, grad_norm        nats per target and per guarded token
    answers    when (before | after), of (probes | watched | new), correct, n
    sampled    step, known, kept, new, learned      a few questions asked on the way, for the report's curve
    watched    step, known, forgotten, ce, weight, next_weight      the watched probes after an epoch
    warning    what                        something that the figures or the run suffer from, in words
    leaner     phase, what, step or cache  memory ran out, and what was done, in words; see kdguard.model.memory
    stopping   a checkpoint of the last whole step is saved, and then the run stops
    finished   the report's verdict in short
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_WORD, _COUNT, _NUMBER = str, int, int | float
# What is read of each kind, by whoever reads a file that somebody else may have written.
_HELD: dict[str, dict[str, Any]] = {
    "phase": {"name": _WORD},
    "process": {"pid": _COUNT, "host": _WORD},
    "progress": {"phase": _WORD, "done": _COUNT, "total": _COUNT},
    "loss": {"step": _COUNT, "steps": _COUNT, "ce": _NUMBER, "kl": _NUMBER},
    "answers": {"when": _WORD, "of": _WORD, "correct": _COUNT, "n": _COUNT},
    "sampled": dict.fromkeys(("step", "known", "kept", "new", "learned"), _COUNT),
    "watched": {"step": _COUNT, "known": _COUNT, "forgotten": _COUNT, "weight": _NUMBER},
    "leaner": {"what": _WORD},
}


class Events:
    """Passes each event to its listeners, and appends it to `path` once there is one."""

    def __init__(self, *listeners: Callable[[Event], None]) -> None:
        self.listeners = list(listeners)
        self.path: Path | None = None
        self.phase: str | None = None  # the last that began
        self._early: list[Event] = []  # warnings that came before there was a path
        self._written = 0.0  # when progress was last written

    def emit(self, event: str, **values: Any) -> None:
        entry = {"event": event, "time": round(time.time(), 3), **values}
        if event == "phase":
            self.phase = values["name"]
        if self.path is None and event == "warning":
            self._early.append(entry)
        while self.path is not None and self._early:
            _append(self.path, json.dumps(self._early.pop(0), ensure_ascii=False))
        if self.path is not None and (event != "progress" or self._due(**values)):
            _append(self.path, json.dumps(entry, ensure_ascii=False))
        for listener in self.listeners:
            listener(entry)

    def _due(self, done: int, total: int, **values: Any) -> bool:
        now = time.monotonic()
        if now - self._written < 1 and done < total:
            return False
        self._written = now
        return True

    def leaner(self, what: str, **how: int) -> None:
        """Memory ran out in this phase, and `what` was done. how: the `step` of training, or AtOnce's `cache`."""
        self.emit("leaner", phase=self.phase, what=what, **how)

    def progress(self, phase: str) -> Callable[[int, int], None]:
        """A callback `(done, total)` for one phase."""
        return lambda done, total: self.emit("progress", phase=phase, done=done, total=total)


def read_events(path: Path) -> list[Event]:
    """The events of a run so far; a line that is still being written, or never was to its end, is left out."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if _is_event(event):
                events.append(event)
    return events


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    held = {"time": _NUMBER, **_HELD.get(event["event"], {})}
    held |= {key: _COUNT for key in ("step", "cache") if key in event}
    return all(isinstance(event.get(key), kind) and _is_sane(event[key]) for key, kind in held.items())


def _is_sane(value: Any) -> bool:
    """Whether a word can be written, and a number counted with."""
    if isinstance(value, str):
        return value.isascii() or not re.search("[\ud800-\udfff]", value)
    return bool(value != value or abs(value) < 2**53)  # a loss may be NaN


def _append(path: Path, line: str) -> None:
    """Write a line of its own, also after one that a crash has cut short."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(f"{line}\n".encode())
