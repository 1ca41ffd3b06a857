"""The strength dial: what a finished run knows at several strengths of its adapter, and the choice of one."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.helpers import rescale_adapter_scale

from kdguard.asking import DRIFT_ROWS
from kdguard.config import resolve
from kdguard.data.batches import Collator
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.files import write_whole, writing_folder
from kdguard.guard.rehearsal import REHEARSAL, load_rows
from kdguard.guard.teacher import drift
from kdguard.model.load import load_tuned
from kdguard.model.memory import at_once
from kdguard.model.strength import scale_saved_adapter
from kdguard.probes.answer import ask
from kdguard.probes.score import Answer
from kdguard.probes.watch import Allowance, Settled, split
from kdguard.questions import asked_in, base_in
from kdguard.report import run as run_folder
from kdguard.report.build import outcome, write_pages, write_report
from kdguard.report.figures import Pair, kept, pair
from kdguard.report.run import Run, alone, finish_dial, write_answers
from kdguard.report.warn import ces_in


@dataclass(frozen=True)
class Point:
    """What the adapter knows at one strength: the watched probes steer the choice, the others score it."""

    strength: float
    watched: list[Pair]
    probes: list[Pair]
    new: list[Answer]

    @property
    def learned(self) -> float:
        return sum(answer.correct for answer in self.new) / max(len(self.new), 1)

    @property
    def watched_forgotten(self) -> int:
        return kept(self.watched).forgotten

    def figures(self) -> dict[str, Any]:
        old = kept(self.probes)
        return {
            "strength": self.strength,
            "learned": self.learned if self.new else None,
            "known": old.known,
            "forgotten": old.forgotten,
            "gained": old.gained,
            "forgetting": old.forgetting,
            "watched_known": kept(self.watched).known,
            "watched_forgotten": self.watched_forgotten,
        }


@alone
def dial(
    run: Run,
    strengths: Sequence[float],
    events: Events,
    *,
    budget: str | None = None,
    choose: float | None = None,
    trust_remote_code: bool = False,
) -> tuple[list[Point], Point | None]:
    """Measure a run at `strengths`, and write the one that is chosen into its adapter and its report.

    budget: choose, of the strengths whose watched probes keep it, the one that has learned most, and of equals the one
        that forgets least. choose: choose this one. With neither, or when no strength above 0 keeps the budget, nothing
        but the figures of the dial is written. trust_remote_code: as in `load_config`.
    """
    if choose is not None and not 0 < choose <= 1:
        raise InputError("a strength is more than 0, which is the base, and at most 1", "--strength 0.8")
    config = resolve({"budget": budget, "trust_remote_code": trust_remote_code}, run.path / run_folder.CONFIG)
    written, was = run.report["strength"], run.report["budget"] or {}
    limit = was.get("limit") if budget is None else config.budget
    asked_then = asked_in(run, config, events)
    renderer, new = asked_then.renderer, asked_then.new
    base = base_in(run, config, renderer, events)
    at_once.tell = events.leaner
    at_once.as_in(run.path / run_folder.EVENTS)
    rehearsed = run.path / run_folder.CHECKPOINTS / REHEARSAL
    for_drift = load_rows(rehearsed, base.model)[:DRIFT_ROWS] if rehearsed.exists() else []
    model = load_tuned(base, run.path / run_folder.ADAPTER)

    def asked(pairs: Sequence[Pair]) -> list[Pair]:
        before = [each.before for each in pairs]
        return pair(before, ask(model, renderer, [asked_then.probes[each.id] for each in before]))

    points = []
    wanted = sorted({*strengths, *([] if choose is None else [choose])})
    events.emit("phase", name="dial")
    for done, strength in enumerate(wanted):
        events.emit("progress", phase="dial", done=done, total=len(wanted))
        with rescale_adapter_scale(model, strength / written):
            # In the batches of the run: in 16 bits their shape can change an answer.
            watched, probes = asked(run.watched), asked(run.probes)
            if limit is not None and not watched:
                watched, probes = split(probes, config.seed, limit)
            points.append(Point(strength, watched, probes, ask(model, renderer, new)))
    write_whole(run.path / run_folder.DIAL, json.dumps([point.figures() for point in points], indent=1) + "\n")

    chosen = next((point for point in points if point.strength == choose), None)
    allowance = None if limit is None else Allowance(limit, kept(points[0].watched).known)
    if budget is not None:
        within = [point for point in points if point.strength and point.watched_forgotten <= allowance.forgotten]
        chosen = max(within, key=_worth, default=None)
    if chosen is None:
        write_pages(run.path, run.report)
        return points, None
    settled = None
    if allowance:
        done = f"strength {chosen.strength:g} was {'dialled' if budget is None else 'chosen by the dial'}"
        settled = Settled(allowance, chosen.strength, chosen.watched_forgotten, done)
    with rescale_adapter_scale(model, chosen.strength / written):
        moved = (
            drift(model, for_drift, Collator(base.tokenizer.pad_token_id))
            if for_drift
            else run.report["drift"]["nats_per_token"]  # the checkpoints were deleted: as it was
        )
    new_before = [each.before for each in run.new]
    ces = ces_in(run.path / run_folder.EVENTS)
    found = outcome(chosen.strength, chosen.probes, (new_before, chosen.new), moved, settled, config.goal, ces)
    still = {key: value for key, value in run.report.items() if key != "exported"}  # those were of another strength
    _write(run, chosen, {**still, **found}, events)
    return points, chosen


def _worth(point: Point) -> tuple[float, ...]:
    """Of those within a budget: what has learned most; where nothing tells, as of plain text, what is strongest."""
    return (point.learned, -point.watched_forgotten, point.strength) if point.new else (point.strength,)


def _write(run: Run, chosen: Point, report: dict[str, Any], events: Events) -> None:
    """Write the strength: everything beside what is there, and then in its place, which nothing but renames do."""
    with writing_folder(run.path / run_folder.DIALLED) as new:
        for name in (run_folder.CONFIG, run_folder.EVENTS, run_folder.DIAL):  # what the pages are made of
            if (run.path / name).exists():
                shutil.copy(run.path / name, new)
        for name in (run_folder.ADAPTER, *run_folder.ANSWERS):
            if (run.path / name).exists():
                shutil.copytree(run.path / name, new / name)
        scale_saved_adapter(new / run_folder.ADAPTER, chosen.strength / run.report["strength"])
        for folder, pairs in (("watched", chosen.watched), ("probes", chosen.probes)):
            if pairs:
                write_answers(new / folder / "before.jsonl", [each.before for each in pairs])
                write_answers(new / folder / "after.jsonl", [each.after for each in pairs])
        write_answers(new / "new" / "after.jsonl", chosen.new)
        write_report(new, report, events)
    finish_dial(run.path)
