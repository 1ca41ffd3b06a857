"""(before, after) -> the report: `report.json` for programs, `report.html` for people, the adapter's model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from kdguard import __version__
from kdguard.config import TuneConfig
from kdguard.events import Event, Events, read_events
from kdguard.files import write_whole
from kdguard.probes.score import Answer
from kdguard.probes.watch import Settled
from kdguard.report import run as run_folder
from kdguard.report.contract import Report
from kdguard.report.figures import Kept, Pair, by_category, by_level, kept, learned, pair
from kdguard.report.render import render
from kdguard.report.schema import read_dial
from kdguard.report.warn import few_known, nothing_learned
from kdguard.report.why import in_words

FORMAT = 1

Answers = tuple[Sequence[Answer], Sequence[Answer]]


def build_report(
    config: TuneConfig,
    *,
    probes: Answers,
    new: Answers,
    drift: float,
    cost: dict[str, Any],
    settled: Settled | None = None,
    adopted: str | None = None,
    ces: Sequence[float] = (),
) -> Report:
    """The contents of `report.json`. `probes` and `new` are (before, after); shares are 0 to 1.

    settled: what the budget made of the end of training. adopted: the adapter that another tool trained. ces: the
    cross-entropy of each training step, in nats.
    """
    report = {
        "format": FORMAT,
        "kdguard": __version__,
        "model": config.model,
        "data": config.data_name,
        "adopted": adopted,
        "goal": config.goal,
        "seed": config.seed,
        "guard": {
            "weight": config.guard_weight if config.guard else 0.0,
            "teacher": config.teacher,
            "rehearsal": config.rehearsal if config.guard else 0.0,
        },
        "cost": cost,
        **outcome(settled.strength if settled else 1.0, pair(*probes), new, drift, settled, config.goal, ces),
    }
    return cast(Report, report)


def outcome(
    strength: float,
    probes: Sequence[Pair],
    new: Answers,
    drift: float,
    settled: Settled | None,
    goal: str,
    ces: Sequence[float] = (),
) -> dict[str, Any]:
    """The part of a report that changes with the adapter's strength."""
    old, lesson = kept(probes), learned(*new)
    return {
        "strength": strength,
        "learned": asdict(lesson),
        "kept": {**asdict(old), "told": old.told},
        "levels": by_level(probes),
        "drift": {"nats_per_token": drift},
        "budget": settled and budget(settled, old),
        "warnings": [*few_known(old.known, old.n), *nothing_learned(lesson, ces, goal)],
    }


def budget(settled: Settled, old: Kept) -> dict[str, Any]:
    """The report's `budget`: what was done, whether the scored probes met it, and if not, why."""
    limit = settled.allowance.limit
    met = old.forgetting is not None and old.forgetting <= limit
    reason = None
    if old.forgetting is None:
        reason = "the base knew none of the probes"
    elif not met and settled.forgotten > settled.allowance.forgotten:
        reason = settled.done
    elif not met and settled.allowance.known < settled.allowance.needed:
        reason = f"{settled.allowance.known:,} known probes were watched; to be sure of {limit:.2%}, " + (
            f"{settled.allowance.needed:,} are needed" if limit else "no number is enough"
        )
    elif not met:
        reason = "the watched probes kept it and the scored ones did not: one in five such runs ends so by chance"
    return {
        "limit": limit,
        "met": met,
        "watched": settled.allowance.known,
        "allowed": settled.allowance.forgotten,
        "forgotten": settled.forgotten,
        "done": settled.done,
        "reason": reason,
    }


def write_report(out: Path, report: Report, events: Events) -> None:
    """Write the model card, `report.html`, and last `report.json`: where that one is, the run is whole."""
    events.emit("finished", learned=report["learned"]["after"], forgetting=report["kept"]["forgetting"])
    write_pages(out, report)
    write_whole(out / run_folder.REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def write_pages(out: Path, report: Report) -> None:
    """Write what people read: the adapter's model card and `report.html`."""
    from kdguard.report.plots import plot_dial, plot_training, plot_watched

    pairs = {folder: run_folder.read_pairs(out / folder) for folder in ("probes", "new")}
    plots = {}
    told: dict[str, dict[int, Event]] = {"loss": {}, "sampled": {}, "watched": {}}
    for event in read_events(out / run_folder.EVENTS):
        if event["event"] in told:
            told[event["event"]][event["step"]] = event  # a resumed run comes to some steps again
    losses, sampled, watched = (list(found.values()) for found in told.values())
    if losses:
        plots["While training"] = plot_training(losses, sampled)
    if watched:
        plots["The budget while training"] = plot_watched(watched)
    if (out / run_folder.DIAL).exists():
        points = read_dial(out / run_folder.DIAL)
        plots["Learned and forgotten by the adapter's strength"] = plot_dial(points, report["strength"])
    found = run_folder.read_explained(out)
    config = (out / run_folder.CONFIG).read_text(encoding="utf-8")
    flow = by_category(pairs["probes"])
    html = render(
        "report.html",
        report=report,
        verdict=verdict(report),
        pairs=pairs,
        plots=plots,
        flow=flow,
        config=config,
        found=found,
        reasons=in_words(found) if found else {},
        exported=run_folder.read_exported(out, report),
        nearest={probe["id"]: probe["rows"] for probe in found["probes"]} if found else {},
    )
    write_whole(out / run_folder.ADAPTER / "README.md", render("model_card.md", report=report, export=None))
    write_whole(out / "report.html", html)


def verdict(report: Report) -> str:
    """The run in one sentence."""
    new, old = report["learned"], report["kept"]
    said = f"Learned {new['after']:.1%} of {new['n']:,} training questions" if new["n"] else ""
    if not old["known"]:
        said += "; t" if said else "T"
        return f"{said}he base answered none of the {old['n']:,} probes, so forgetting cannot be told."
    said += " and forgot" if said else "Forgot"
    said += f" {old['forgotten']:,} of the {old['known']:,} probes it knew ({old['forgetting']:.1%})"
    if report["budget"]:
        said += f", {'within' if report['budget']['met'] else 'over'} the budget of {report['budget']['limit']:.2%}"
        if report["budget"].get("reason"):
            said += f": {report['budget']['reason']}"
    return said + "."
