"""The warm-up teacher: a frozen snapshot that the student starts from, kept out of its checkpoints."""

import pytest
import torch
from transformers import TrainingArguments

from kdguard.data.batches import Collator
from kdguard.errors import KdguardError
from kdguard.guard.teacher import Guard, teacher_view
from kdguard.guard.warmup import warm_up
from kdguard.model.load import add_adapter, base_view
from tests.guard.test_trainer import adapter, rows, trainer


def arguments(out) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(300, 320)[None]).logits


def test_the_teacher_is_the_student_as_it_was_after_the_warm_up(tmp_path, demo):
    model = add_adapter(demo, rank=8)
    guard = Guard(teacher=warm_up(model, rows(16), Collator(0), arguments(tmp_path)))
    started = adapter(model)
    with teacher_view(model, guard):
        teacher = logits(model)
    assert torch.equal(logits(model), teacher)
    with base_view(model):
        assert not torch.allclose(logits(model), teacher)

    run = trainer(model, tmp_path, guard=guard, steps=4)
    run.train()
    assert run.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    with teacher_view(model, guard):
        assert torch.equal(logits(model), teacher)
    trained = {name for name, weight in adapter(model).items() if not torch.equal(weight, started[name])}
    assert trained and all(".default." in name for name in adapter(model))


def test_a_checkpoint_holds_the_student_alone(tmp_path, demo):
    """The Trainer would load a teacher's folder in a checkpoint in the student's place."""
    model = add_adapter(demo, rank=8)
    guard = Guard(teacher=warm_up(model, rows(16), Collator(0), arguments(tmp_path)))
    run = trainer(model, tmp_path, guard=guard, steps=2)
    run.train()
    run.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]


def test_a_resumed_run_takes_the_same_snapshot(tmp_path, demo):
    model = add_adapter(demo, rank=8)
    warm_up(model, rows(16), Collator(0), arguments(tmp_path))
    wanted = logits(model)
    demo.model = model.unload()
    model = add_adapter(demo, rank=8)
    guard = Guard(teacher=warm_up(model, [], Collator(0), arguments(tmp_path), resume=True))
    torch.testing.assert_close(logits(model), wanted)
    with teacher_view(model, guard):
        torch.testing.assert_close(logits(model), wanted)


def test_without_known_rows_there_is_nothing_to_warm_up_on(tmp_path, demo):
    with pytest.raises(KdguardError, match="nothing to warm up on"):
        warm_up(add_adapter(demo, rank=8), [], Collator(0), arguments(tmp_path))
