"""What people see in the terminal: everybody's text as it is, and tables that fit."""

import io

import pytest
from rich.console import Console

from kdguard.report.build import verdict
from kdguard.report.run import read_run
from kdguard.tables import print_comparison, print_explained, print_run
from kdguard.terminal import Terminal
from tests.report.test_build import HOSTILE, run  # noqa: F401
from tests.report.test_why import explained

STEERING = "\x1b[2J"  # would clear the screen


def screen(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, emoji=False)


@pytest.mark.parametrize("show", ["run", "compare", "explain"])
def test_hostile_text_is_shown_as_it_is(run, show):  # noqa: F811
    out, finished = screen(), read_run(run)
    if show == "compare":
        print_comparison(out, [finished, finished])
    elif show == "explain":
        row = {"where": "a.jsonl:1", "question": f"{HOSTILE[0]}?", "answer": f"{HOSTILE[1]}{STEERING}", "named": 1}
        probes = [
            {"question": pair.before.question, "base": pair.before.answer, "tuned": pair.after.answer, "rows": [row]}
            for pair in finished.probes
        ]
        print_explained(out, explained(moved={"forgotten": 0.1, "kept": None}, often=[row], probes=probes))
    else:
        print_run(out, finished, verdict(finished.report))
    shown = out.file.getvalue()
    for text in HOSTILE:
        assert text in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [60, 80, 140])
def test_nothing_is_wider_than_the_terminal(run, width):  # noqa: F811
    out = screen(width)
    print_comparison(out, [read_run(run), read_run(run)])
    assert max(map(len, out.file.getvalue().splitlines())) <= width


def test_progress_keeps_its_count_and_time_left_where_the_note_is_long():
    out = Console(file=io.StringIO(), width=80, force_terminal=True, highlight=False)
    terminal = Terminal(out)
    terminal({"event": "phase", "name": "train"})
    terminal({"event": "sampled", "learned": 1, "new": 32, "kept": 60, "known": 64})
    terminal({"event": "watched", "forgotten": 17, "known": 450, "next_weight": 12.8})
    terminal({"event": "loss", "ce": 3.4, "kl": 0.07, "step": 31, "steps": 46})
    terminal.progress.refresh()
    terminal.close()
    shown = out.file.getvalue()
    assert "31/46" in shown and "-:--:--" in shown and "weight 12.8" in shown and "…" not in shown
