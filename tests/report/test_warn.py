"""Warnings: told where the figures would mislead, and not where they do not."""

import io
import random

import pytest
from rich.console import Console

from kdguard.report.build import verdict, write_pages
from kdguard.report.figures import Learned, share_interval
from kdguard.report.render import render
from kdguard.report.run import read_run
from kdguard.report.warn import ces_in, few_known, nothing_learned
from kdguard.tables import print_comparison, print_run
from kdguard.ui.progress import progress
from tests.conftest import ROOT
from tests.report.test_build import run  # noqa: F401

STUDIO = ROOT / "kdguard" / "ui" / "templates"


def test_few_known_probes_are_told_with_how_little_they_tell():
    """0 of 20 forgotten reads like a perfect guard: up to a sixth may be forgotten all the same."""
    (said,) = few_known(20, 100)
    assert "only 20 of 100 probes rightly (20%)" in said
    assert f"up to {share_interval(0, 20)[1]:.1%} could still be" in said
    assert "none of the 100 probes" in few_known(0, 100)[0]


def test_probes_are_enough_when_they_can_tell_1_percent():
    enough = next(n for n in range(1, 1000) if share_interval(0, n)[1] <= 0.01)
    assert few_known(enough, enough) == []
    assert "only 367 known probes" in few_known(enough - 1, enough)[0] and enough == 368
    assert few_known(1000, 2000) == []
    assert len(few_known(1000, 2001)) == 1


def curve(begin: float, end: float, noise: float = 0.2, steps: int = 45) -> list[float]:
    rng = random.Random(0)
    return [begin + (end - begin) * i / steps + rng.gauss(0, noise) for i in range(steps)]


FLAT, FALLING = curve(2.0, 2.0), curve(3.0, 0.5)


@pytest.mark.parametrize(
    ("before", "after", "ces", "goal", "wanted"),
    [
        (0.1, 0.9, FALLING, "facts", None),
        (0.1, 0.9, [], "facts", None),  # an adopted adapter
        (0.1, 0.1, FALLING, "facts", "too long to be matched"),
        (0.1, 0.1, FLAT, "facts", "the cross-entropy did not clearly fall, from 1.9"),
        (0.1, 0.05, [], "facts", "10.0% of 40 training questions before, 5.0% after"),
        (0.1, 0.2, FLAT, "facts", "hardly anything was learned"),
        (0.0, 0.0, FALLING, "style", None),
        (0.0, 0.0, FLAT, "style", "hardly anything was learned"),
        (1.0, 1.0, FALLING, "facts", None),
    ],
)
def test_what_was_not_learned_is_told(before, after, ces, goal, wanted):
    said = nothing_learned(Learned(40, before, after, None), ces, goal)
    assert len(said) == (wanted is not None) and (wanted or "") in "".join(said)


def test_a_cross_entropy_that_is_mostly_noise_has_not_clearly_fallen():
    """The first step above the last proves nothing: of steps that only differ by their rows half do."""
    nothing = Learned(0, 0.0, 0.0, None)  # plain text asks nothing
    told = 0
    for seed in range(200):
        rng = random.Random(seed)
        told += bool(nothing_learned(nothing, [2 + rng.gauss(0, 0.3) for _ in range(40)], "facts"))
    assert told >= 190
    assert nothing_learned(nothing, [2.0, 1.9], "facts") == []  # too few steps to tell


def test_of_a_step_that_came_twice_the_last_counts(tmp_path):
    path = tmp_path / "events.jsonl"
    steps = [(1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0)]
    path.write_text(
        "".join(f'{{"event": "loss", "time": 0, "step": {s}, "steps": 3, "ce": {ce}, "kl": 0}}\n' for s, ce in steps)
    )
    assert ces_in(path) == [3.0, 2.0, 1.0]


def test_a_warning_stands_wherever_the_figures_stand(run):  # noqa: F811
    finished = read_run(run)
    finished.report["warnings"] = ["only <20> probes", "nothing [bold]learned"]
    write_pages(run, finished.report)
    page, card = (run / "report.html").read_text(), (run / "adapter" / "README.md").read_text()
    assert "Warning:</b> only &lt;20&gt; probes." in page and "Warning: only \\<20\\> probes." in card
    headline = {"report": finished.report, "verdict": "", "flow": {}, "data": "a.jsonl"}
    assert "Warning:</b> only &lt;20&gt; probes." in render("headline.html", STUDIO, **headline)
    for show in (lambda out: print_run(out, finished, verdict(finished.report)), lambda out: both(out, finished)):
        out = Console(width=80, record=True, file=io.StringIO())
        show(out)
        said = " ".join(out.export_text().split())
        assert "only <20> probes" in said and "nothing [bold]learned" in said, said


def both(out: Console, finished) -> None:
    print_comparison(out, [finished, finished])


def test_an_older_report_has_none_and_is_shown(run):  # noqa: F811
    finished = read_run(run)
    del finished.report["warnings"]
    write_pages(run, finished.report)
    assert "Warning" not in (run / "report.html").read_text()


def test_the_page_tells_a_warning_once_though_a_resumed_run_warns_again():
    warning = {"event": "warning", "time": 0.0, "what": "few"}
    seen = progress([warning, warning])
    assert seen.warnings == ["few"]
    shown = {"name": "mine", "state": "finished", "verdict": "", "said": [], "left": "", "plot": "", "progress": seen}
    assert render("live.html", STUDIO, **shown).count("Warning:</b> few.") == 1
