"""A run goes on as what it was: what has changed since is told, and nothing is gone on with in silence."""

import json
import shutil

import pytest

from kdguard.guard.checkpoint import WHOLE, last_whole
from tests.safe.conftest import one_line


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """A run that was killed as its second checkpoint was begun, with its data in a file of its own."""
    folder = tmp_path_factory.mktemp("stopped")
    data = folder / "facts.jsonl"
    shutil.copy(small.arguments[0], data)
    out = folder / "run"
    arguments = ["tune", data, *small.arguments[1:], "--out", out]
    done = small.run(*arguments, cwd=folder, out=str(out), kill_on="checkpoint-6")
    assert done.returncode == -9 and last_whole(out / "checkpoints").name == "checkpoint-3"
    return folder


def test_the_newest_checkpoints_and_the_best_are_kept(small):
    """The best is the one whose sampled questions were answered rightly most often."""
    folder = small.whole / "checkpoints"
    sampled = [json.loads(line) for line in (small.whole / "events.jsonl").read_text().splitlines()]
    sampled = {event["step"]: event["kept"] + event["learned"] for event in sampled if event["event"] == "sampled"}
    best = max(sampled, key=sampled.__getitem__)
    there = {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}
    assert there == {6, 9, best}
    assert last_whole(folder) == folder / "checkpoint-9"


@pytest.mark.parametrize("harm", ["cut short", "a file is gone", "not finished", "no list"])
def test_a_torn_checkpoint_is_passed_over(small, tmp_path, harm):
    folder = tmp_path / "checkpoints"
    shutil.copytree(small.whole / "checkpoints", folder)
    newest = folder / "checkpoint-9"
    if harm == "cut short":
        (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-1])
    elif harm == "a file is gone":
        (newest / "rng_state.pth").unlink()
    elif harm == "not finished":
        newest.rename(folder / ".checkpoint-9.part")
    else:
        (newest / WHOLE).write_text("{")
    assert last_whole(folder) == folder / "checkpoint-6"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data", "the training rows"),
        ("lr", "--lr (0.00"),
        ("config", "--epochs (3 then, 5 now)"),
        ("versions", "transformers (5.0.0 then"),
        ("base", "the base's weights"),
    ],
)
def test_what_has_changed_is_refused_by_name(small, stopped, tmp_path, change, told):
    folder = tmp_path / "moved"
    shutil.copytree(stopped, folder)
    out, more = folder / "run", []
    config = (out / "config.yaml").read_text().replace(str(stopped), str(folder))
    (out / "config.yaml").write_text(config.replace("epochs: 3", "epochs: 5") if change == "config" else config)
    if change == "data":
        rows = (folder / "facts.jsonl").read_text().splitlines(keepends=True)
        (folder / "facts.jsonl").write_text("".join([*rows[1:], rows[0]]))
    elif change == "lr":
        more = ["--lr", "1e-5"]
    elif change in ("versions", "base"):
        was = json.loads((out / "fingerprint.json").read_text())
        was |= {"transformers": "5.0.0"} if change == "versions" else {"weights": "0" * 64}
        (out / "fingerprint.json").write_text(json.dumps(was))
    (out / ".lock").unlink()  # of the process that was killed; it holds nobody back
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = small.go_on(out, *more)
    assert done.returncode == 2 and told in one_line(done) and "--allow-changes" in one_line(done)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    if change in ("data", "lr"):
        done = small.go_on(out, *more, "--allow-changes")
        assert done.returncode == 0, done.stderr


def test_a_run_that_went_on_tells_all_the_time_it_took(small, stopped):
    """And in a folder that was moved: nothing in it knows where it lies."""
    done = small.go_on(stopped / "run")
    assert done.returncode == 0, done.stderr
    small.assert_same_end(stopped / "run")
    first = json.loads((small.whole / "report.json").read_text())["cost"]
    went_on = json.loads((stopped / "run" / "report.json").read_text())["cost"]
    assert went_on["steps"] == first["steps"] and went_on["seconds"] > 0
