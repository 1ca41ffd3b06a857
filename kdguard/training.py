"""transformers' Trainer as a run uses it: its arguments, what it tells, Ctrl-C, and its checkpoints."""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from kdguard.config import TuneConfig
from kdguard.events import Events
from kdguard.guard.lean import CHECKPOINTING
from kdguard.model.load import compute_dtype, device
from kdguard.probes.packs import Probe
from kdguard.probes.score import Answer

SAMPLES = 6  # times that a run is sampled on its way, at most
SAMPLED_KNOWN, SAMPLED_NEW = 64, 32  # questions


def training_arguments(config: TuneConfig, checkpoints: Path) -> TrainingArguments:
    on_gpu = device().type == "cuda"
    micro = config.micro_batch_size or max(n for n in range(1, 5) if config.batch_size % n == 0)
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // micro,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        bf16=compute_dtype() is torch.bfloat16,
        fp16=compute_dtype() is torch.float16,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="epoch",
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        activation_checkpointing=on_gpu or config.offload,
        activation_checkpointing_kwargs=CHECKPOINTING,
    )


def last_checkpoint(checkpoints: Path) -> str | None:
    """The newest whole checkpoint: the Trainer writes into its place, so the newest may be torn."""
    needed = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    folders = sorted(checkpoints.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    whole = [folder for folder in folders if all((folder / name).exists() for name in needed)]
    return str(whole[-1]) if whole else None


class Tell(TrainerCallback):
    """Passes the Trainer's log on as events."""

    def __init__(self, events: Events, steps: int) -> None:
        self.events, self.steps = events, steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "ce" in logs:
            self.events.emit(
                "loss",
                step=state.global_step,
                steps=self.steps,
                epoch=round(state.epoch, 3),
                ce=logs["ce"],
                kl=logs["kl"],
                lr=logs["learning_rate"],
                grad_norm=float(logs.get("grad_norm", 0.0)),
            )


class Sample(TrainerCallback):
    """Asks a few old and new questions on the way, so that people see learning and keeping as it happens.

    known, new: of which it asks a seeded sample. ask: answers questions. What comes out steers nothing.
    """

    def __init__(
        self,
        events: Events,
        known: Sequence[Probe],
        new: Sequence[Probe],
        seed: int,
        ask: Callable[[Sequence[Probe]], list[Answer]],
    ) -> None:
        rng = random.Random(seed)
        self.events, self.ask = events, ask
        self.known = rng.sample(known, min(SAMPLED_KNOWN, len(known)))
        self.new = rng.sample(new, min(SAMPLED_NEW, len(new)))

    def on_epoch_end(self, args, state, control, **kwargs):
        epoch = round(state.epoch)
        if state.epoch % 1 > 1e-6 or epoch % -(-int(args.num_train_epochs) // SAMPLES):
            return
        right = [answer.correct for answer in self.ask([*self.known, *self.new])]
        known = len(self.known)
        self.events.emit(
            "sampled",
            step=state.global_step,
            known=known,
            kept=sum(right[:known]),
            new=len(self.new),
            learned=sum(right[known:]),
        )


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM saves a checkpoint after the step and stops; the second stops at once."""
    stopped = 0

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if stopped:
                control.should_save = control.should_training_stop = True

    def handler(number, frame):
        nonlocal stopped
        stopped = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    trainer.add_callback(Stop())
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, was in previous.items():
            signal.signal(number, was)
    if stopped:
        raise KeyboardInterrupt(stopped)
