"""(before, after) -> the report: `report.json` for programs, `report.html` for people, the adapter's model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kdguard import __version__
from kdguard.config import TuneConfig
from kdguard.events import Events, read_events
from kdguard.files import write_whole
from kdguard.probes.score import Answer
from kdguard.report import run as run_folder
from kdguard.report.figures import kept, learned, pair

FORMAT = 1

Answers = tuple[Sequence[Answer], Sequence[Answer]]


def build_report(
    config: TuneConfig, *, probes: Answers, new: Answers, drift: float, cost: dict[str, Any]
) -> dict[str, Any]:
    """The contents of `report.json`. `probes` and `new` are (before, after); shares are 0 to 1."""
    old = kept(pair(*probes))
    return {
        "format": FORMAT,
        "kdguard": __version__,
        "model": config.model,
        "data": str(config.data),
        "goal": config.goal,
        "seed": config.seed,
        "guard": {
            "weight": config.guard_weight if config.guard else 0.0,
            "teacher": config.teacher,
            "rehearsal": config.rehearsal if config.guard else 0.0,
        },
        "strength": 1.0,
        "learned": asdict(learned(*new)),
        "kept": asdict(old),
        "drift": {"nats_per_token": drift},
        "cost": cost,
        "budget": None
        if config.budget is None
        else {"limit": config.budget, "met": old.forgetting is not None and old.forgetting <= config.budget},
    }


def write_report(out: Path, report: dict[str, Any], events: Events) -> None:
    """Write the model card, `report.html`, and last `report.json`: where that one is, the run is whole."""
    (out / run_folder.REPORT).unlink(missing_ok=True)
    events.emit("finished", learned=report["learned"]["after"], forgetting=report["kept"]["forgetting"])
    write_whole(out / run_folder.ADAPTER / "README.md", _render("model_card.md", report=report))
    pairs = {
        folder: pair(*(run_folder.read_answers(out / folder / f"{when}.jsonl") for when in ("before", "after")))
        for folder in ("probes", "new")
    }
    losses = [event for event in read_events(out / run_folder.EVENTS) if event["event"] == "loss"]
    html = _render("report.html", report=report, verdict=verdict(report), pairs=pairs, losses=losses)
    write_whole(out / "report.html", html)
    write_whole(out / run_folder.REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def verdict(report: dict[str, Any]) -> str:
    """The run in one sentence."""
    new, old = report["learned"], report["kept"]
    said = f"Learned {new['after']:.1%} of {new['n']:,} training questions"
    if not old["known"]:
        return f"{said}; the base answered none of the {old['n']:,} probes, so forgetting cannot be told."
    said += f" and forgot {old['forgotten']:,} of the {old['known']:,} probes it knew ({old['forgetting']:.1%})"
    if report["budget"]:
        said += f", {'within' if report['budget']['met'] else 'over'} the budget of {report['budget']['limit']:.1%}"
    return said + "."


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.startswith("report.html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{share:.1%}"
    environment.filters["markdown"] = _escape_markdown
    environment.globals["polyline"] = _polyline
    return environment.get_template(template + ".j2").render(**values)


def _escape_markdown(text: object) -> str:
    return "".join("\\" + c if c in "\\`*_{}[]<>()#+-!|~" else " " if c in "\r\n" else c for c in str(text))


def _polyline(losses: list[dict[str, Any]], key: str, width: float, height: float) -> str:
    """The `points` of an SVG polyline of one loss over the steps, its largest value at the top."""
    values = [event[key] for event in losses]
    top = max(values, default=0) or 1
    last = max(len(values) - 1, 1)
    return " ".join(f"{i / last * width:.1f},{height - v / top * height:.1f}" for i, v in enumerate(values))
