"""Several runs of one base beside each other: the questions on which they differ, and the page that shows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdguard.files import write_whole
from kdguard.probes.score import Answer
from kdguard.report.render import render
from kdguard.report.run import Run


@dataclass(frozen=True)
class Comparison:
    """The runs' names, and every question known to the base that one of them forgot: its answer, and theirs.

    `differ` is None where the runs were asked different probes.
    """

    names: list[str]
    differ: list[tuple[Answer, list[Answer]]] | None


def compare(runs: Sequence[Run]) -> Comparison:
    short = [run.path.name for run in runs]
    names = short if len(set(short)) == len(short) else [str(run.path) for run in runs]
    if len({tuple(pair.before.id for pair in run.probes) for run in runs}) > 1:
        return Comparison(names, None)
    by_question = zip(*(run.probes for run in runs), strict=True)
    differ = [
        (pairs[0].before, [pair.after for pair in pairs])
        for pairs in by_question
        if pairs[0].before.correct and not all(pair.after.correct for pair in pairs)
    ]
    return Comparison(names, differ)


def write_comparison(path: Path, runs: Sequence[Run]) -> None:
    """Write the page for people, whole or not at all."""
    from kdguard.report.plots import plot_runs

    found = compare(runs)
    reports = [run.report for run in runs]
    points = [
        (name, report["learned"]["after"], forgetting)
        for name, report in zip(found.names, reports, strict=True)
        if report["learned"]["n"] and (forgetting := report["kept"]["forgetting"]) is not None
    ]
    page = render(
        "compare.html",
        rows=list(zip(found.names, reports, strict=True)),
        names=found.names,
        differ=found.differ,
        plot=plot_runs(points) if points else "",
    )
    write_whole(path, page)
