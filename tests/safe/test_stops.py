"""Ctrl-C, SIGTERM and a closed terminal: at once, with the command that goes on, and nothing lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from kdguard.events import read_events
from kdguard.guard.checkpoint import last_whole
from tests.conftest import ROOT
from tests.safe.conftest import half_written, one_line, some

CTRL_C, TERM, HUP = int(signal.SIGINT), int(signal.SIGTERM), int(signal.SIGHUP)
PHASES = [
    *("read", "load", "ask probes before", "ask new before", "ask watched before", "rehearse", "train"),
    *("settle", "ask probes after", "ask new after", "ask watched after", "report"),
]


@pytest.mark.parametrize("phase", ["train", *some([phase for phase in PHASES if phase != "train"], 1)])
@pytest.mark.parametrize(("number", "name"), some([(TERM, "SIGTERM"), (CTRL_C, "Ctrl-C"), (HUP, "SIGHUP")], 1))
def test_a_run_that_is_stopped_says_how_to_go_on_and_does(small, tmp_path, phase, number, name):
    out = tmp_path / "run"
    done = small.tune(out, signals=[phase, number])
    if phase not in ("report", "settle") or done.returncode:  # these may be over before the signal comes
        assert done.returncode == 128 + number, done.stderr
        assert done.seconds_to_end < 10
        assert f"stopped by {name}" in one_line(done) if (out / "config.yaml").exists() else "nothing was written"
        assert half_written(out) == []
        assert not (out / ".lock").exists()
        done = small.go_on(out)
    assert done.returncode == 0, done.stderr
    small.assert_same_end(out)


def test_a_second_one_ends_it_at_once(small, tmp_path):
    """Even while a checkpoint is being saved: the one before is whole."""
    out = tmp_path / "run"
    done = small.tune(out, signals=["train", CTRL_C, TERM])
    assert done.returncode in (128 + CTRL_C, 128 + TERM) and done.seconds_to_end < 3
    done = small.go_on(out)
    assert done.returncode == 0, done.stderr
    small.assert_same_end(out)


def start(small, out, **streams) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "kdguard", "tune", *small.arguments, "--out", out],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **{"preexec_fn": lambda: signal.signal(HUP, signal.SIG_DFL), **streams},  # these tests may be under nohup
    )


def wait_for_step(out, step: int) -> None:
    began = time.monotonic()
    while not any(event["event"] == "loss" and event["step"] >= step for event in read_events(out / "events.jsonl")):
        assert time.monotonic() - began < 120
        time.sleep(0.05)


def test_a_terminal_that_is_closed_stops_a_run_that_can_go_on(small, tmp_path):
    """The system sends SIGHUP, more than once where a shell sends it on, and each word to the terminal is an error."""
    out = tmp_path / "run"
    here, there = os.openpty()
    with start(small, out, stdin=there, stdout=there, stderr=there) as process:
        os.close(there)
        wait_for_step(out, 4)
        os.close(here)
        process.send_signal(HUP)
        process.send_signal(HUP)
        assert process.wait(20) == 128 + HUP
    assert int(last_whole(out / "checkpoints").name.split("-")[1]) >= 4 and half_written(out) == []
    done = small.go_on(out)
    assert done.returncode == 0, done.stderr
    small.assert_same_end(out)


def test_a_run_that_nobody_reads_any_more_goes_on_and_so_does_one_under_nohup(small, tmp_path):
    out = tmp_path / "run"
    ignored = {"preexec_fn": lambda: signal.signal(HUP, signal.SIG_IGN)}
    with start(small, out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **ignored) as process:
        process.stdout.readline()
        process.stdout.close()
        wait_for_step(out, 1)
        process.send_signal(HUP)
        assert process.wait(120) == 0
    small.assert_same_end(out)
