"""A dial is cut short at any moment: the run is whole, at the old strength or at the new one, and can be dialled."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdguard.model.strength import scale_saved_adapter
from kdguard.report.run import at_work, read_run
from tests.forked import ROOT, Ended
from tests.safe.conftest import ANSWERS, Small, half_written, one_line, some

ADAPTER = "adapter/adapter_model.safetensors"
RENAMED = "run/adapter", "dialled/adapter", "run/new", "dialled/report.html", "dialled/report.json"
DIAL = "--strength", "0.5", "--steps", "1"
NEXT = {"compare": (), "probe": ("--prompts", 1, "--samples", 0), "explain": (), "dial": DIAL, "tune": ()}


def dial(small: Small, run: Path, **harm) -> Ended:
    return small.run("dial", run, *DIAL, cwd=run.parent, out=str(run), **harm)


@pytest.fixture
def run(small, tmp_path):
    """Without its checkpoints, which people delete."""
    return shutil.copytree(small.whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))


@pytest.fixture(scope="module")
def dialled(small, tmp_path_factory):
    """A run that was dialled without harm, and how that ended."""
    run = shutil.copytree(small.whole, tmp_path_factory.mktemp("dialled") / "run")
    (run / "explain.json").write_text("{}")
    shutil.rmtree(run / "checkpoints")
    done = dial(small, run)
    assert done.returncode == 0, done.stderr
    assert not (run / "explain.json").exists(), "it told of another strength"
    scaled = shutil.copytree(small.whole / "adapter", run.parent / "adapter")
    scale_saved_adapter(scaled, 0.5 / read_run(small.whole).report["strength"])
    assert (run / ADAPTER).read_bytes() == (scaled / "adapter_model.safetensors").read_bytes()
    return run, done


def assert_of_one_strength(run: Path, old: Path, new: Path) -> None:
    same = new if json.loads((run / "report.json").read_text())["strength"] == 0.5 else old
    for name in (ADAPTER, *ANSWERS, "report.json"):
        assert (run / name).read_bytes() == (same / name).read_bytes(), name


@pytest.mark.parametrize("harm", [*some([{"kill_on": name} for name in RENAMED], 2), *some(range(1, 171), 1)], ids=str)
def test_a_dial_that_is_killed_leaves_a_run_of_one_strength(small, dialled, run, harm):
    """Even to scripts that read the folder as it lies there: a report is of the adapter beside it."""
    new, ended = dialled
    assert ended.operations <= 170
    if isinstance(harm, int) and harm > ended.operations:
        pytest.skip(f"a dial does {ended.operations} operations on files")
    done = dial(small, run, **(harm if isinstance(harm, dict) else {"kill_at": harm}))
    assert done.returncode == -9, done.stderr
    if (run / "report.json").exists():
        assert_of_one_strength(run, small.whole, new)
    read_run(run)
    assert_of_one_strength(run, small.whole, new)
    done = dial(small, run)
    assert done.returncode == 0, done.stderr
    assert read_run(run).report["strength"] == 0.5
    assert_of_one_strength(run, small.whole, new)
    assert half_written(run) == [] and not (run / "dialled").exists()


@pytest.mark.parametrize("command", some(list(NEXT), 2))
def test_whoever_comes_next_finishes_a_dial(small, dialled, run, command):
    assert dial(small, run, kill_on="dialled/adapter").returncode == -9
    assert not (run / "report.json").exists() and not (run / "adapter").exists()
    if command == "tune":
        done = small.go_on(run)
        assert done.returncode == 2 and "this run has finished" in one_line(done)
    else:
        done = small.run(command, run, *NEXT[command], cwd=run.parent)
        assert done.returncode == 0, done.stderr
    assert_of_one_strength(run, small.whole, dialled[0])


@pytest.mark.parametrize("at", some(range(1, 26), 1))
def test_a_dial_on_a_full_disk_leaves_the_run_as_it_was(small, dialled, run, at):
    new, ended = dialled
    assert ended.written <= 25
    if at > ended.written:
        pytest.skip(f"a dial opens files {ended.written} times to write")
    done = dial(small, run, full_at=at)
    assert done.returncode in (1, 2) and "No space left on device" in one_line(done)
    assert half_written(run) == [] and read_run(run).report["strength"] != 0.5
    assert_of_one_strength(run, small.whole, new)
    assert dial(small, run).returncode == 0
    assert_of_one_strength(run, small.whole, new)


def test_a_dial_that_is_stopped_leaves_the_run_as_it_was(small, dialled, run):
    done = dial(small, run, signals=["dial", int(signal.SIGINT)])
    assert done.returncode == 130, done.stderr
    assert half_written(run) == [] and read_run(run).report["strength"] != 0.5
    assert_of_one_strength(run, small.whole, dialled[0])


@pytest.mark.parametrize("command", some(["dial", "explain", "export"], 2))
def test_a_second_one_at_work_on_a_run_is_refused(small, run, command):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = ["--to", "adapter", "--out", run.parent / "exported"] if command == "export" else []
    with at_work(run):
        done = small.run(command, run, *more, cwd=run.parent)
        assert done.returncode == 2 and "another process is at work on this run" in one_line(done)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_two_dials_at_once_scale_once(small, dialled, run):
    command = [sys.executable, "-m", "kdguard", "dial", str(run), *DIAL]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert sorted(each.wait() for each in both) in ([0, 2], [0, 0])
    assert read_run(run).report["strength"] == 0.5
    assert_of_one_strength(run, small.whole, dialled[0])


def test_a_run_that_was_dialled_since_it_was_read_is_dialled_from_where_it_is(small, dialled, run):
    """Two of one process: the second has read the first one's start."""
    from kdguard.dial import dial as story
    from kdguard.events import Events

    finished = read_run(run)
    for _ in range(2):
        story(finished, [0.5], Events(), choose=0.5)
    assert_of_one_strength(run, small.whole, dialled[0])
