"""Full disks, folders that may not be written, clocks that go back: one clear line, and nothing half written."""

import json
import re
import subprocess

import pytest

from kdguard.report.run import at_work
from tests.forked import BALLAST
from tests.safe.conftest import half_written, one_line, some


@pytest.fixture
def disk(tmp_path):
    """`disk(size)`: a small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


@pytest.mark.parametrize("at", some(range(1, 101), 1))
def test_a_disk_that_is_full_at_any_write(small, tmp_path, at):
    """Every opening of one of the run's files to write is a moment at which the disk may be full."""
    out = tmp_path / "run"
    assert small.ended.written <= 100
    if at > small.ended.written:
        pytest.skip(f"the run opens its files {small.ended.written} times to write")
    done = small.tune(out, full_at=at)
    assert done.returncode in (1, 2), done.stderr
    assert "No space left on device" in one_line(done)
    assert half_written(out) == [] and not (out / "report.json").exists()
    done = small.go_on(out)
    assert done.returncode == 0, done.stderr
    small.assert_same_end(out)


@pytest.mark.parametrize("left", some([0, 50_000, 400_000, 1_000_000, 2_000_000, 3_000_000], 1))
@pytest.mark.parametrize("phase", some(["train", "ask probes after", "report"], 1))
def test_a_real_disk_that_fills_up(small, disk, left, phase):
    """What libraries write in Rust and C++ meets it too."""
    out = disk("size=200m") / "run"
    done = small.tune(out, full_in=[phase, left])
    if done.returncode:
        assert done.returncode == 1 and "No space left on device" in one_line(done)
        assert half_written(out) == [] and not (out / "report.json").exists()
    (out.parent / BALLAST).unlink()
    if done.returncode:
        done = small.go_on(out)
    assert done.returncode == 0, done.stderr
    small.assert_same_end(out)


def test_a_disk_too_small_for_the_checkpoints_is_told_before_the_first_step(small, disk):
    out = disk("size=3m") / "run"
    done = small.tune(out)
    assert done.returncode == 1 and "the checkpoints need" in one_line(done)
    assert not list((out / "checkpoints").glob("checkpoint-*")) and half_written(out) == []


def test_a_folder_that_cannot_be_written_is_told(small, disk, tmp_path):
    done = small.tune(disk("ro") / "run")
    assert done.returncode == 2 and "Read-only" in one_line(done)


def test_a_folder_of_somebody_else_is_told(small, tmp_path):
    ours = {*tmp_path.parents, tmp_path, *small.whole.parents}
    for folder in (folder for folder in ours if "pytest-of-" in str(folder)):
        folder.chmod(0o755)  # what is read is anybody's to read
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    done = small.tune(theirs / "run", uid=65534)
    if re.search("^(LookupError|ModuleNotFoundError|ImportError): ", done.stderr, re.M):
        pytest.skip("another user cannot read this Python's own files")
    assert done.returncode == 2 and "Permission denied" in one_line(done)
    assert list(theirs.iterdir()) == []


def test_a_clock_that_goes_back_changes_nothing(small, tmp_path):
    out = tmp_path / "run"
    done = small.tune(out, clock=-3600)
    assert done.returncode == 0, done.stderr
    small.assert_same_end(out)
    cost = json.loads((out / "report.json").read_text())["cost"]
    assert 0 < cost["seconds"] < 600


def test_two_at_work_on_one_run(small, tmp_path):
    """The second is refused while the first is at work, and no longer."""
    out = tmp_path / "run"
    with at_work(out):
        (out / "events.jsonl").write_text(json.dumps({"event": "process", "time": 0, "pid": 7, "host": "pc"}) + "\n")
        (out / "config.yaml").write_text("model: demo\ndata: facts.jsonl\n")
        done = small.go_on(out)
        assert done.returncode == 2 and "process 7 on pc is at work" in one_line(done)
    (out / "events.jsonl").unlink()
    (out / "config.yaml").unlink()
    with at_work(out):
        done = small.tune(out)
        assert done.returncode == 2 and "at work" in one_line(done)
    assert small.tune(out).returncode == 0
    small.assert_same_end(out)
