"""Kept teacher states: the same training as with a live teacher, in a file that goes when the run is over."""

import shutil
from collections import namedtuple

import pytest
import torch

from kdguard.guard.kept import KeptStates
from kdguard.guard.teacher import Guard
from kdguard.model.load import add_adapter, load_base
from tests.guard.test_trainer import adapter, rows, trainer, unlabelled


def states(row: int, length: int) -> torch.Tensor:
    return torch.full((length - 1, 8), float(row))


def test_the_teacher_runs_once_a_row(tmp_path):
    lengths = [3, 5, 4]
    kept = KeptStates(tmp_path / "teacher.states", lengths, "a")
    asked = []

    def visit(batch):
        def compute(places):
            asked.extend(batch[place] for place in places)
            return [states(batch[place], lengths[batch[place]]) for place in places]

        found = kept.states_of(batch, compute)
        assert torch.equal(found, torch.cat([states(row, lengths[row]) for row in batch]))

    for batch in ([0, 2], [2, 1], [1, 0], [2, 1, 0]):
        visit(batch)
    assert sorted(asked) == [0, 1, 2]


def test_training_is_that_of_a_live_teacher(tmp_path):
    """Three epochs, so that two thirds of the teacher's states are read back."""
    after = []
    for keep in (True, False):
        torch.manual_seed(0)
        model = add_adapter(load_base("demo", quant="none"), rank=8)
        run = trainer(
            model,
            tmp_path,
            micro=4,
            steps=6,
            rehearsal_dataset=unlabelled(rows(4, 1)),
            rehearsal=0.5,
            keep_teacher=keep,
            guard=Guard(weight=6.0),
        )
        run.train()
        after.append(adapter(model))
        assert not list(tmp_path.glob("teacher*"))
    for name, weight in after[0].items():
        torch.testing.assert_close(after[1][name], weight, rtol=1e-3, atol=1e-5)


def kept(folder, lengths, of) -> KeptStates:
    return KeptStates(folder / "teacher.states", lengths, of)


def test_a_resumed_run_has_the_states_of_its_checkpoint(tmp_path):
    """Not those that came after it: they are computed again, in the very batch in which they were computed first."""
    first, checkpoint = kept(tmp_path, [3, 5], "a"), tmp_path / "checkpoint"
    first.states_of([1], lambda places: [states(1, 5)])
    first.of_step.clear()  # a step is over
    first.save(checkpoint)
    first.states_of([0], lambda places: [torch.full((2, 8), torch.nan)])
    second = kept(tmp_path, [3, 5], "a")
    second.resume(checkpoint)
    found = second.states_of([1], lambda places: pytest.fail("row 1 was kept"))
    assert torch.equal(found, states(1, 5))
    assert torch.equal(second.states_of([0], lambda places: [states(0, 3)]), states(0, 3))
    second.close(finished=True)
    assert not second.path.exists()


def test_states_of_other_rows_are_not_read(tmp_path):
    first, checkpoint = kept(tmp_path, [3, 5], "a"), tmp_path / "checkpoint"
    first.states_of([1], lambda places: [states(1, 5)])
    first.save(checkpoint)
    other = kept(tmp_path, [5, 3], "b")
    other.resume(checkpoint)
    assert torch.equal(other.states_of([1], lambda places: [states(7, 3)]), states(7, 3))


@pytest.mark.parametrize("harm", ["cut short", "another file"])
def test_states_that_are_not_those_of_the_checkpoint_are_not_read(tmp_path, harm):
    """A file that was lost was made anew, for other rows, by a process that was killed before its checkpoint."""
    first, checkpoint = kept(tmp_path, [3, 5], "a"), tmp_path / "checkpoint"
    first.states_of([1], lambda places: [states(1, 5)])
    first.of_step.clear()
    first.save(checkpoint)
    first.close(finished=False)
    if harm == "cut short":
        first.path.write_bytes(first.path.read_bytes()[:40])
    else:
        first.path.unlink()
        kept(tmp_path, [3, 5], "a").states_of([0], lambda places: [states(0, 3)])
    second = kept(tmp_path, [3, 5], "a")
    second.resume(checkpoint)
    assert torch.equal(second.states_of([1], lambda places: [states(1, 5)]), states(1, 5))
    assert torch.equal(second.states_of([1], lambda places: pytest.fail("it is kept")), states(1, 5))


def test_a_teacher_that_was_live_stays_live(tmp_path, monkeypatch):
    """What is read was rounded in another batch: the rest of the run would not be the one that was never stopped."""
    first, checkpoint = kept(tmp_path, [3], "a"), tmp_path / "checkpoint"
    first.live = True
    first.save(checkpoint)
    second = kept(tmp_path, [3], "a")
    second.resume(checkpoint)
    second.states_of([0], lambda places: [states(0, 3)])
    assert second.live and not second.have


def test_without_room_on_the_disk_the_teacher_stays_live(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=100))
    here = kept(tmp_path, [3, 5], "a")
    for _ in range(2):
        assert torch.equal(here.states_of([1], lambda places: [states(1, 5)]), states(1, 5))
    assert here.live and not list(tmp_path.iterdir())
