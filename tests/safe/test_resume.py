"""A run goes on as what it was: what has changed since is told, and nothing is gone on with in silence."""

import json
import shutil

import pytest

from kdguard.errors import InputError
from kdguard.events import read_events
from kdguard.guard.checkpoint import WHOLE, last_whole
from kdguard.resume import take_over
from tests.safe.conftest import one_line, some


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
        ("probes", "the probes"),
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
    elif change == "probes":
        (folder / "probes.jsonl").write_text("".join(small.probes.read_text().splitlines(keepends=True)[1:]))
        more = ["--probes", str(folder / "probes.jsonl")]
    elif change in ("versions", "base"):
        was = json.loads((out / "fingerprint.json").read_text())
        was |= {"transformers": "5.0.0"} if change == "versions" else {"weights": "0" * 64}
        (out / "fingerprint.json").write_text(json.dumps(was))
    (out / ".lock").unlink()  # of the process that was killed; it holds nobody back
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = small.go_on(out, *more)
    assert done.returncode == 2 and told in one_line(done) and "--allow-changes" in one_line(done)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    if change in some(["data", "lr", "probes"], 1):
        done = small.go_on(out, *more, "--allow-changes")
        assert done.returncode == 0, done.stderr


def test_an_adapter_that_is_trained_on_is_asked_anew(small, tmp_path):
    """Killed after its end was asked, and then given more epochs: those answers are not the new end's."""
    out = tmp_path / "run"
    done = small.tune(out, kill_on="report.json.part")
    assert done.returncode == -9
    answers = (out / "new" / "after.jsonl").read_bytes()
    done = small.go_on(out, "--epochs", "6", "--allow-changes")
    assert done.returncode == 0, done.stderr
    events = read_events(out / "events.jsonl")
    last = max(i for i, event in enumerate(events) if event["event"] == "loss")
    asked = [event["of"] for event in events[last:] if event["event"] == "answers" and event["when"] == "after"]
    assert asked == ["probes", "new", "watched"] and (out / "new" / "after.jsonl").read_bytes() != answers


def take_over_with(out, changed: str, before: str, now: str, **how) -> list[str]:
    """What is left of an unfinished run when a key of its fingerprint has changed."""
    shutil.rmtree(out, ignore_errors=True)
    said = ["probes/before.jsonl", "probes/after.jsonl", "new/before.jsonl", "checkpoints/rehearsal.jsonl"]
    said += ["checkpoints/watched.json", "checkpoints/teacher-0.states"]
    for name in (*said, "checkpoints/warm-up/teacher/x", "checkpoints/within-budget-3/x", "checkpoints/checkpoint-3/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")
    told = {"precision": "float32 on cpu", "torch": "2"}
    (out / "fingerprint.json").write_text(json.dumps(told | {changed: before}))
    take_over(out, told | {changed: now}, **how)
    return sorted(str(path.relative_to(out)) for path in out.glob("*/*"))


KEPT = "checkpoints/checkpoint-3"
SAID = ["checkpoints/rehearsal.jsonl", "checkpoints/teacher-0.states", "checkpoints/warm-up"]
OF_BUDGET = ["checkpoints/watched.json", "checkpoints/within-budget-3"]
BEFORE = ["new/before.jsonl", "probes/before.jsonl"]


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ("torch", [KEPT, *SAID, *OF_BUDGET, *BEFORE]),
        ("--lr", [KEPT, *SAID, *OF_BUDGET, *BEFORE]),
        ("probes", [KEPT, *SAID, *BEFORE]),
        ("weights", [KEPT]),
        ("quant", [KEPT]),
    ],
)
def test_what_a_change_has_made_wrong_is_forgotten(tmp_path, changed, left):
    with pytest.raises(InputError, match="has changed"):
        take_over_with(tmp_path / "run", changed, "a", "b", allow_changes=False)
    assert len(list((tmp_path / "run").glob("*/*"))) == 9
    assert take_over_with(tmp_path / "run", changed, "a", "b", allow_changes=True) == sorted(left)


@pytest.mark.parametrize(
    ("changed", "before", "now"), [("--rank", "8", "16"), ("precision", "bfloat16 on cuda", "float32 on cpu")]
)
def test_what_no_adapter_and_no_optimiser_survives_is_refused_all_the_same(tmp_path, changed, before, now):
    with pytest.raises(InputError, match=r"adapter cannot be trained|of another device") as caught:
        take_over_with(tmp_path / "run", changed, before, now, allow_changes=True)
    assert "tune anew" in caught.value.hint and len(list((tmp_path / "run").glob("*/*"))) == 9


@pytest.mark.parametrize("name", some(["fingerprint.json.part", "config.yaml.part"], 1))
def test_a_run_that_was_killed_before_it_began_is_begun(small, tmp_path, name):
    done = small.tune(tmp_path / "run", kill_on=name)
    assert done.returncode == -9 and not (tmp_path / "run" / "config.yaml").exists()
    done = small.go_on(tmp_path / "run", "--epochs", "1")
    assert done.returncode == 0, done.stderr


def test_a_run_that_went_on_tells_all_the_time_it_took(small, stopped):
    """And in a folder that was moved: nothing in it knows where it lies."""
    done = small.go_on(stopped / "run")
    assert done.returncode == 0, done.stderr
    small.assert_same_end(stopped / "run")
    first = json.loads((small.whole / "report.json").read_text())["cost"]
    went_on = json.loads((stopped / "run" / "report.json").read_text())["cost"]
    assert went_on["steps"] == first["steps"]
    trained = []  # when each of the two processes began to train, and its last step
    for event in read_events(stopped / "run" / "events.jsonl"):
        if event["event"] == "phase" and event["name"] == "train":
            trained.append([event["time"]] * 2)
        elif event["event"] == "loss":
            trained[-1][1] = event["time"]
    (began, ended), (again, end) = trained
    assert ended > began and went_on["seconds"] >= ended - began + end - again - 0.01
