"""Ctrl-C and SIGTERM: at once, with the command that goes on, and nothing lost."""

import signal

import pytest

from tests.safe.conftest import half_written, one_line, some

CTRL_C, TERM = int(signal.SIGINT), int(signal.SIGTERM)
PHASES = [
    *("read", "load", "ask probes before", "ask new before", "ask watched before", "rehearse", "train"),
    *("settle", "ask probes after", "ask new after", "ask watched after", "report"),
]


@pytest.mark.parametrize("phase", ["train", *some([phase for phase in PHASES if phase != "train"], 1)])
@pytest.mark.parametrize(("number", "name"), some([(TERM, "SIGTERM"), (CTRL_C, "Ctrl-C")], 1))
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
