"""Several runs on one page: who forgot what, and nobody's text becomes markup."""

import json
import shutil

import pytest

from kdguard.report.compare import compare, write_comparison
from kdguard.report.run import read_run
from tests.report.test_build import run  # noqa: F401


@pytest.fixture
def two(run, tmp_path):  # noqa: F811
    other = shutil.copytree(run, tmp_path / "<b>$x_1$ & co")
    path = other / "probes" / "after.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "answer": row["answers"][0], "correct": True}) + "\n" for row in rows))
    return [read_run(run), read_run(other)]


def test_what_one_of_them_forgot_is_shown_with_everyones_answer(two):
    found = compare(two)
    assert len(found.differ) == sum(pair.outcome == "forgotten" for pair in two[0].probes) > 0
    for base, (forgetful, faithful) in found.differ:
        assert base.correct and faithful.correct and not forgetful.correct


def test_the_page_shows_names_and_answers_as_they_are(two, tmp_path):
    write_comparison(tmp_path / "page.html", two)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;$x_1$ &amp; co" in page and "<b>$" not in page
    assert page.count("<svg") == 1 and "<script" not in page


def test_runs_asked_different_probes_have_only_their_figures(two, tmp_path):
    two[1].probes.pop()
    assert compare(two).differ is None
    write_comparison(tmp_path / "page.html", two)
    assert "different probes" in (tmp_path / "page.html").read_text()
