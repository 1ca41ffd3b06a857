"""Checkpoints in a folder where others are torn, and a best one that was found after its checkpoint was written."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from kdguard.errors import KdguardError
from kdguard.events import Events
from kdguard.guard.checkpoint import WHOLE, last_whole
from kdguard.guard.teacher import Guard
from kdguard.model.load import add_adapter
from kdguard.training import Sample
from tests.guard.test_trainer import trainer


@pytest.fixture
def made(demo, tmp_path):
    """A run of two steps with a checkpoint after each."""
    run = trainer(add_adapter(demo, rank=2), tmp_path, save="steps", guard=Guard(6.0))
    run.args.save_steps, run.args.save_total_limit = 1, 2
    assert run.kept.room == run.room_for_checkpoints(2)  # which there is before a limit is set
    return run


def steps(folder) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def tear(checkpoint) -> None:
    (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:-1])


def test_torn_ones_make_way_and_never_for_them_a_whole_one(made, tmp_path):
    made.train()
    for step in (20, 21):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{step}")
        tear(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-2" / WHOLE).unlink()  # of a plain Trainer
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert steps(tmp_path) == [1, 2] and last_whole(tmp_path).name == "checkpoint-2"


def test_a_torn_one_is_never_gone_on_from(made, tmp_path):
    made.train()
    for step in (1, 2):
        tear(tmp_path / f"checkpoint-{step}")
    for checkpoint in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(KdguardError, match="damaged"):
            made.train(resume_from_checkpoint=checkpoint)


def test_one_whose_place_was_being_taken_gives_it_back(made, tmp_path):
    made.train()
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.old")
    assert last_whole(tmp_path) == tmp_path / "checkpoint-2"


def test_what_a_killed_process_was_writing_goes(made, tmp_path):
    """Also where the run that goes on writes no checkpoint more."""
    made.train()
    (tmp_path / ".writing").mkdir()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".checkpoint-2.old")
    made.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_room_for_the_checkpoints_is_not_taken_by_kept_states(made, tmp_path, monkeypatch):
    """There is room for either: the states come first, and most checkpoints after them."""
    free = made.room_for_checkpoints(4) + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    made.kept.room = made.room_for_checkpoints(4)
    made.train()
    assert made.kept.live and not list(tmp_path.glob("*.states"))


def test_the_best_is_found_in_what_was_told(tmp_path):
    """A checkpoint that Ctrl-C saved knows nothing of what was asked after it."""
    events = Events()
    events.path = tmp_path / "events.jsonl"
    for step, kept in ((1, 3), (2, 5), (3, 4), (4, 9)):
        events.emit("sampled", step=step, known=9, kept=kept, new=0, learned=0)
    state = TrainerState(global_step=3, epoch=3.0)
    sample = Sample(events, [], [], 0, lambda questions: pytest.fail("it was asked already"))
    sample.on_train_begin(SimpleNamespace(num_train_epochs=4), state, TrainerControl())
    assert (state.best_global_step, state.best_metric) == (2, 5)
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["step"] == 4
