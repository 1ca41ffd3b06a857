"""The warm-up teacher: a snapshot of the adapter after one pass over rows that the base already knows.

It has learned the format of the answers and no new fact (arXiv 2604.15574). For base models that do not answer in the
format of the data, whose own answers would hold the tuned model back from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdguard.data.tokens import Row
from kdguard.errors import KdguardError
from kdguard.guard.teacher import Guard, take_snapshot
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model.adapter import put_adapter
from kdguard.model.load import save_adapter
from kdguard.processes import by_main

NAME = "teacher"
WARM_UP = "warm-up"  # its folder, beside the checkpoints


def warm_up(
    model: PeftModel,
    known: Sequence[Row],
    collate: Callable,
    arguments: TrainingArguments,
    *,
    resume: bool = False,
    **how: Any,
) -> str:
    """Train `model` for one epoch on the `known` rows, snapshot its adapter, and return the snapshot's name.

    The snapshot is kept beside the checkpoints; a run that resumes takes it from there. Raises KdguardError when no
    row is known.

    collate, how: what else GuardedTrainer takes.
    """
    kept = Path(arguments.output_dir) / WARM_UP
    if by_main(lambda: resume and kept.exists()):
        put_adapter(model, kept / NAME, NAME)
        put_adapter(model, kept / NAME, model.active_adapter)
        return NAME
    if not known:
        raise KdguardError(
            "the base answers none of the training questions rightly, so there is nothing to warm up on",
            "--teacher base, or add rows to the data that it knows",
        )
    once = replace(arguments, num_train_epochs=1, save_strategy="no", warmup_steps=0, report_to="none")
    trainer = GuardedTrainer(model, once, train_dataset=known, data_collator=collate, guard=Guard(weight=0.0), **how)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    take_snapshot(model, NAME)
    save_adapter(model, kept, NAME)
    return NAME
