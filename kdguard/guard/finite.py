"""A step that would spoil the adapter: a loss or gradient that is not finite, or no target. Whose rows are they?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch

from kdguard.data.batches import pieces
from kdguard.data.rows import Rows
from kdguard.errors import InputError, KdguardError

if TYPE_CHECKING:
    from kdguard.guard.trainer import GuardedTrainer

NAMED = 5  # rows


def stop_not_finite(trainer: "GuardedTrainer", what: str) -> NoReturn:
    """`what` of the step under way is not finite: save the last whole step, and raise KdguardError with the rows.

    The rows go through the model again, one by one, with their gradients. Of several processes none can do that alone,
    and each names all rows that it has.
    """
    step = trainer.state.global_step + 1
    rows = _rows_of(trainer)
    slower = f"--lr {trainer.args.learning_rate / 4:g}"
    if not all(weight.isfinite().all() for weight in trainer.model.parameters() if weight.requires_grad):
        raise KdguardError(f"the adapter is not finite any more in step {step:,}", f"a lower learning rate: {slower}")
    alone = trainer.accelerator.num_processes == 1 and not trainer._sharded
    guilty = (_guilty(trainer) if alone else []) or rows
    kept = trainer.save_last_step()
    first = next((row for row in guilty if row < len(trainer.train_dataset)), None)
    look = "" if first is None else f"look at it: kdguard data show DATA --row {_number(trainer, first)}"
    slow = f"a lower learning rate: {slower}"
    raise KdguardError(
        f"{what} is not finite in step {step:,}, because of {named(trainer, guilty)}; no weight has been touched by it"
        + (f", and the step before is kept for --resume: {kept}" if kept else ""),
        # Of every row, it is not the rows.
        "; or ".join(filter(None, (slow, look) if len(guilty) == len(rows) else (look, slow))),
    )


def refuse_no_targets(trainer: "GuardedTrainer") -> NoReturn:
    """The step under way has no target token: its loss would be 0, and nothing would be learned of it."""
    raise InputError(
        f"step {trainer.state.global_step + 1:,} has no target token to learn: the labels of "
        f"{named(trainer, _rows_of(trainer))} are all -100",
        "labels are input_ids where the answer stands, and -100 elsewhere",
    )


def named(trainer: "GuardedTrainer", rows: Sequence[int]) -> str:
    """Rows by where they stand, the first NAMED of them."""
    data, n = trainer.train_dataset, len(trainer.train_dataset)

    def name(row: int) -> str:
        if row >= n:
            return f"rehearsal row {row - n + 1:,}"
        return data.example(row).where if isinstance(data, Rows) else f"row {_number(trainer, row):,}"

    more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
    return ", ".join(map(name, rows[:NAMED])) + more


def _number(trainer: "GuardedTrainer", row: int) -> int:
    """Of a training row among all rows, from 1 on."""
    data = trainer.train_dataset
    return (data.places[row] if isinstance(data, Rows) else row) + 1


def _rows_of(trainer: "GuardedTrainer") -> list[int]:
    """The rows of the step under way, in the order of the data; rehearsal rows follow."""
    return sorted(row for batch in trainer._step.micro_batches for row in batch["row_ids"].tolist())


def _guilty(trainer: "GuardedTrainer") -> list[int]:
    """Those that have a loss or a gradient by themselves that is not finite."""
    found = []
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    for batch in trainer._step.micro_batches:
        single = pieces(batch, 1, trainer.lean.longest)
        for row, piece in zip(batch["row_ids"].tolist(), single, strict=True):
            trainer.model.zero_grad()
            with trainer.compute_loss_context_manager():
                counts = trainer._step.counts
                loss = trainer.model(**trainer._prepare_inputs(piece), counts=(counts[0], counts[1]))["loss"]
            loss.backward()
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            if not all(torch.isfinite(each).all() for each in (loss, *gradients)):
                found.append(row)
    return sorted(found)
