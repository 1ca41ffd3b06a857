"""transformers' Trainer as a run uses it: its arguments, what it tells, when it saves, and how it is stopped."""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from kdguard import processes
from kdguard.config import TuneConfig
from kdguard.errors import InputError
from kdguard.events import Event, Events, read_events
from kdguard.files import sync
from kdguard.guard.checkpoint import SafeTrainer
from kdguard.guard.lean import CHECKPOINTING
from kdguard.model.load import compute_dtype, device
from kdguard.probes.packs import Probe
from kdguard.probes.score import Answer

SAMPLES = 6  # times that a run is sampled on its way, at most
SAMPLED_KNOWN, SAMPLED_NEW = 64, 32  # questions
SAVE_EVERY = 600  # seconds


def refuse_missing(report_to: str) -> None:
    """Raise InputError where what a run is to report to is not installed: transformers would say so after minutes."""
    packages = {"none": ("kdguard",), "tensorboard": ("tensorboard", "tensorboardX")}.get(report_to, (report_to,))
    if not any(map(find_spec, packages)):
        raise InputError(f"--report-to {report_to}: it is not installed", f"pip install {report_to}")


def training_arguments(config: TuneConfig, checkpoints: Path) -> TrainingArguments:
    on_gpu = device().type == "cuda"
    micro = micro_batch_size(config)
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // processes.count() // micro,
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
        report_to=config.report_to,
        project="kdguard",
        run_name=checkpoints.parent.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        activation_checkpointing=on_gpu or config.offload,
        activation_checkpointing_kwargs=CHECKPOINTING,
        ddp_timeout=int(processes.TIMEOUT.total_seconds()),
        ddp_find_unused_parameters=False,  # every adapter is in every forward
    )


def micro_batch_size(config: TuneConfig) -> int:
    """Training rows that a process has in memory at once; of an optimiser step each process takes an equal share.

    Raises InputError where there is no such share.
    """
    n = processes.count()
    share, rest = divmod(config.batch_size, n)
    if rest:
        raise InputError(
            f"{n} processes cannot share an optimiser step of {config.batch_size} rows evenly",
            f"--batch-size {n * (share + 1)}: it counts the rows of all processes",
        )
    return max(size for size in range(1, (config.micro_batch_size or 4) + 1) if share % size == 0)


class Tell(TrainerCallback):
    """Passes the Trainer's log on as events, which are on the disk when a checkpoint is."""

    def __init__(self, events: Events, steps: int) -> None:
        self.events, self.steps = events, steps

    def on_save(self, args, state, control, **kwargs):
        processes.by_main(lambda: sync(self.events.path))

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

    known, new: of which it asks a seeded sample. ask: answers questions. What comes out steers nothing, but the
    checkpoint that has answered most rightly is kept beside the newest.
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

    def on_train_begin(self, args, state, control, **kwargs):
        past = processes.by_main(self._past)
        past = {step: right for step, right in past.items() if step <= state.global_step}
        if past:  # the state in a checkpoint may be of before it was asked
            state.best_global_step = max(past, key=past.__getitem__)
            state.best_metric = past[state.best_global_step]
        if state.global_step and state.global_step not in past:
            self.on_epoch_end(args, state, control)  # which a stop may have come before

    def _past(self) -> dict[int, int]:
        """The right answers after each step that was sampled."""
        sampled = (event for event in read_events(self.events.path) if event["event"] == "sampled")
        return {event["step"]: event["kept"] + event["learned"] for event in sampled}

    def on_epoch_end(self, args, state, control, **kwargs):
        epoch = round(state.epoch)
        if state.epoch % 1 > 1e-6 or epoch % -(-int(args.num_train_epochs) // SAMPLES):
            return
        right = [answer.correct for answer in self.ask([*self.known, *self.new])]
        known = len(self.known)
        if state.best_metric is None or sum(right) > state.best_metric:
            state.best_metric, state.best_global_step = sum(right), state.global_step
        self.events.emit(
            "sampled",
            step=state.global_step,
            known=known,
            kept=sum(right[:known]),
            new=len(self.new),
            learned=sum(right[known:]),
        )


class Stops:
    """Ctrl-C, SIGTERM and SIGHUP end a run at once, wherever it is: a KeyboardInterrupt with the signal's number.

    A moment that would leave something half done is held: they come after it. The second one ends the process, unless
    it is SIGHUP: a terminal that is closed sends several. Where SIGHUP was ignored, as by nohup, it is ignored still.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.heard = False  # by this process itself, and not from another one
        self.held = False

    def __enter__(self) -> "Stops":
        # Only the main thread hears signals; elsewhere whoever started it has to stop it.
        main = threading.current_thread() is threading.main_thread()
        numbers = [signal.SIGINT, signal.SIGTERM] if main else []
        if main and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._hear) for number in numbers}
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._lost
        return self

    def __exit__(self, *error: object) -> None:
        sys.unraisablehook = self._unraisable
        for number, before in self._before.items():
            signal.signal(number, before)

    def _lost(self, lost: "sys.UnraisableHookArgs") -> None:
        """What is raised within a destructor goes no further: `check` will raise it again."""
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            self._unraisable(lost)

    def _hear(self, number: int, frame: object) -> None:
        if self.heard:
            if signal.Signals(number).name == "SIGHUP":
                return
            os._exit(128 + number)
        self.asked, self.heard = number, True
        if not self.held:
            self.check()

    def check(self, *_: object) -> None:
        """Raise what was asked for; a listener of events."""
        if self.asked and not self.held:
            raise KeyboardInterrupt(self.asked)

    @contextmanager
    def during(self, trainer: SafeTrainer, tell: Callable[[], None]) -> Iterator[None]:
        """While `trainer` trains: an optimiser's step is held, and before it ends the last whole one is saved.

        tell: called before that. Several processes save together: they stop after the same step and nowhere else.
        """
        trainer.add_callback(_Hold(self))
        self.held = processes.count() > 1
        try:
            yield
        except KeyboardInterrupt:
            self.held = True
            tell()
            trainer.save_last_step()
            raise
        finally:
            self.held = False


class _Hold(TrainerCallback):
    """Holds stops from before an optimiser's step until it is counted and its loss is told."""

    def __init__(self, stops: Stops) -> None:
        self.stops = stops

    def on_substep_end(self, args, state, control, **kwargs):
        self.stops.check()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.stops.held = True

    def on_log(self, args, state, control, **kwargs):
        self.stops.asked = max(processes.gathered(self.stops.asked))
        self.stops.held = False
        self.stops.check()
        self.stops.held = processes.count() > 1


class SaveByTime(TrainerCallback):
    """Saves a checkpoint when the last one is SAVE_EVERY seconds old: an epoch may take a night."""

    def __init__(self) -> None:
        self.saved = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if any(processes.gathered(time.monotonic() - self.saved > SAVE_EVERY)):
            control.should_save = True


def trained_before(events: Sequence[Event]) -> float:
    """Seconds of training in the processes that have worked on a run before, by their events."""
    spent = began = last = 0.0
    for event in events:
        if event["event"] == "process":
            spent, began, last = spent + last - began, 0.0, 0.0
        elif event["event"] == "phase" and event["name"] == "train":
            began = last = event["time"]
        elif event["event"] == "loss" and began:
            last = max(last, event["time"])
    return spent + last - began
