"""Exports in a run's report: how each answered, beside the base and the tuned model. See contract.Exported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from kdguard.files import write_whole
from kdguard.probes.score import Answer
from kdguard.report import run as run_folder
from kdguard.report.build import write_pages
from kdguard.report.contract import Exported, Report
from kdguard.report.figures import Pair, kept, learned, pair
from kdguard.report.run import Run, write_answers


def figures(run: Run, answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """The figures of an entry; each is None where nothing was asked."""
    if not answers:
        return dict.fromkeys(("learned", "kept", "same", "lost"))
    tuned = {what: _beside(pairs, answers[what]) for what, pairs in (("probes", run.probes), ("new", run.new))}
    before = {each.before.id: each.before for each in [*run.probes, *run.new]}
    old = kept(pair([before[answer.id] for answer in answers["probes"]], answers["probes"]))
    right = {what: [each for each in pairs if each.before.correct] for what, pairs in tuned.items()}
    return {
        "learned": asdict(learned([before[answer.id] for answer in answers["new"]], answers["new"])),
        "kept": {**asdict(old), "told": old.told},
        "same": {what: {"n": len(pairs), "count": _same(pairs)} for what, pairs in tuned.items()},
        "lost": {
            what: {"n": len(pairs), "count": sum(not each.after.correct for each in pairs)}
            for what, pairs in right.items()
        },
    }


def dropped(entry: Mapping[str, Any]) -> float:
    """The larger of the shares of right answers, to old and to new questions, that the export has lost."""
    shares = [each["count"] / each["n"] for each in (entry["lost"] or {}).values() if each["n"]]
    return max(shares, default=0.0)


def add_export(run: Run, entry: dict[str, Any], answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Enter an export into the run's report, in the place of an earlier one at the same path."""
    others = [other for other in run.report.get("exported", []) if other["path"] != entry["path"]]
    taken = {other["answers"] for other in others}
    name = f"{entry['to']}-{Path(entry['path']).name}"
    while f"{run_folder.EXPORTED}/{name}" in taken:
        name += "+"
    entry = {**entry, "answers": f"{run_folder.EXPORTED}/{name}" if answers else None}
    for what, found in answers.items():
        write_answers(run.path / run_folder.EXPORTED / name / f"{what}.jsonl", found)
    report: Report = {**run.report, "exported": [*others, cast(Exported, entry)]}
    write_pages(run.path, report)
    write_whole(run.path / run_folder.REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return entry


def _beside(pairs: Sequence[Pair], answers: Sequence[Answer]) -> list[Pair]:
    """The tuned model's answers with the export's, where it was asked."""
    tuned = {each.after.id: each.after for each in pairs}
    return [Pair(tuned[answer.id], answer) for answer in answers]


def _same(pairs: Sequence[Pair]) -> int:
    return sum(each.before.answer == each.after.answer for each in pairs)
