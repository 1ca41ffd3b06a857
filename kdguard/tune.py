"""The story of a run on one page: read, load, probe, rehearse, train, probe again, report."""

import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from kdguard.config import TuneConfig
from kdguard.data import formats
from kdguard.data.formats import Example
from kdguard.data.tokens import CHATML, Collator, Renderer, Row
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.files import write_whole
from kdguard.guard.rehearsal import load_rows, rehearse, save_rows
from kdguard.guard.teacher import Guard, drift
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model.fit import estimate_gib
from kdguard.model.load import add_adapter, compute_dtype, device, load_base, load_tokenizer
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe, load_probes
from kdguard.probes.score import Answer
from kdguard.report import run as run_folder
from kdguard.report.build import build_report, write_report

MAX_NEW_QUESTIONS = 500  # training questions asked before and after; a seeded sample of more rows
MAX_REHEARSAL = 4096  # rehearsal rows written by the base; more passes walk through them again
MAX_REHEARSAL_TOKENS = 256  # a rehearsal row's question and answer each; never longer than the longest training row
DRIFT_ROWS = 64  # further rows that the base wrote, kept out of training, on which drift is measured


def tune(
    config: TuneConfig,
    events: Events,
    *,
    resume: bool = False,
    dry_run: bool = False,
    same_base: Path | None = None,
) -> dict[str, Any]:
    """Run `config` and return its report, or its plan if `dry_run`. Nothing is written until every input is read.

    same_base: a finished run of the same base, data and probes, whose base answers are taken over instead of asked.

    Raises InputError for anything wrong with the input, KdguardError for a run that fails, and KeyboardInterrupt after
    a checkpoint was saved.
    """
    started = time.time()
    out = config.out or default_out(config)
    if resume:
        run_folder.unfinished_config(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: this folder is not empty", "give another --out, or --resume to go on with that run")
    dataset = formats.read(config.data)
    probes = load_probes(config.probes)
    tokenizer = load_tokenizer(config.model, config.revision)
    renderer = Renderer(tokenizer)
    rows = [renderer.row(example, config.max_length) for example in dataset.examples]
    events.emit("phase", name="load")
    base = load_base(config.model, quant=config.quant, revision=config.revision, tokenizer=tokenizer)
    whole = [example for example, row in zip(dataset.examples, rows, strict=True) if len(row.ids) < config.max_length]
    new = new_questions(whole, config.seed)
    plan = {
        "model": config.model,
        "parameters": base.model.num_parameters(),
        "device": str(device()),
        "quant": config.quant,
        "template": "ChatML" if tokenizer.chat_template.endswith(CHATML) else "the tokenizer's own",
        "format": dataset.format,
        "rows": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "target_tokens": sum(row.targets for row in rows),
        "longest": max(len(row.ids) for row in rows),
        "steps": config.epochs * -(-len(rows) // config.batch_size),
        "probes": len(probes),
        "new_questions": len(new),
        "rehearsal_rows": rehearsal_rows(config, len(rows)),
        "memory_gib": estimate_gib(base.model, config, max(len(row.ids) for row in rows)),
        "out": str(out),
    }
    events.emit("plan", config=config.model_dump(mode="json"), **plan)
    if dry_run:
        return {"plan": plan, "config": config.model_dump(mode="json")}

    out.mkdir(parents=True, exist_ok=True)
    events.path = out / run_folder.EVENTS
    if not resume:
        write_whole(out / run_folder.CONFIG, config.to_yaml())

    def answers(folder: str, when: str, questions: list[Probe]) -> list[Answer]:
        path = out / folder / f"{when}.jsonl"
        if resume and path.exists():
            return run_folder.read_answers(path)
        if same_base and when == "before":
            found = run_folder.read_answers(same_base / folder / path.name)
        else:
            phase = f"ask {folder} {when}"
            events.emit("phase", name=phase)
            found = ask(base.model, renderer, questions, progress=events.progress(phase))
        run_folder.write_answers(path, found)
        events.emit("answers", when=when, of=folder, n=len(found), correct=sum(answer.correct for answer in found))
        return found

    probes_before, new_before = answers("probes", "before", probes), answers("new", "before", new)
    rehearsal = _rehearsal(config, base.model, renderer, out, rows, events, resume)
    for_drift, rehearsal = rehearsal[:DRIFT_ROWS], rehearsal[DRIFT_ROWS:]

    set_seed(config.seed)
    model = add_adapter(base, rank=config.rank, attention_only=config.goal == "style")
    collate = Collator(tokenizer.pad_token_id)
    trainer = GuardedTrainer(
        model,
        training_arguments(config, out),
        train_dataset=rows,
        data_collator=collate,
        guard=Guard(config.guard_weight if config.guard else 0.0, config.guard_temperature, config.guard_masked),
        rehearsal_dataset=rehearsal,
        rehearsal=config.rehearsal if config.guard else 0.0,
        callbacks=[_Tell(events, plan["steps"])],
    )
    trainer.remove_callback(PrinterCallback)
    events.emit("phase", name="train")
    training_started = time.perf_counter()
    with _stop_on_ctrl_c(trainer):
        trainer.train(resume_from_checkpoint=_last_checkpoint(out) if resume else None)
    seconds = time.perf_counter() - training_started

    probes_after, new_after = answers("probes", "after", probes), answers("new", "after", new)
    events.emit("phase", name="report")
    report = build_report(
        config,
        probes=(probes_before, probes_after),
        new=(new_before, new_after),
        drift=drift(model, [collate(for_drift[i : i + 16]) for i in range(0, len(for_drift), 16)]),
        cost={
            "steps": trainer.state.global_step,
            "tokens": plan["tokens"] * config.epochs,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(plan["tokens"] * config.epochs / seconds, 1),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "total_seconds": round(time.time() - started, 3),
        },
    )
    _save_adapter(model, out)
    write_report(out, report, events)
    return report


def new_questions(examples: list[Example], seed: int) -> list[Probe]:
    """What the training rows teach, as questions: everything before the last answer, and that answer."""
    chosen = range(len(examples))
    if len(examples) > MAX_NEW_QUESTIONS:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        chosen = sorted(order[:MAX_NEW_QUESTIONS].tolist())
    return [
        Probe(f"row-{i + 1}", "new", examples[i].question, examples[i].answers, messages=examples[i].messages[:-1])
        for i in chosen
    ]


def rehearsal_rows(config: TuneConfig, rows: int) -> int:
    """How many rows the base writes: as many as the run can use, up to MAX_REHEARSAL, and those for drift."""
    used = round(rows * config.epochs * config.rehearsal) if config.guard else 0
    return min(MAX_REHEARSAL, used) + DRIFT_ROWS


def training_arguments(config: TuneConfig, out: Path) -> TrainingArguments:
    on_gpu = device().type == "cuda"
    micro = config.micro_batch_size or max(n for n in range(1, 5) if config.batch_size % n == 0)
    return TrainingArguments(
        output_dir=str(out / run_folder.CHECKPOINTS),
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
        **(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
            if on_gpu
            else {}
        ),
    )


def default_out(config: TuneConfig) -> Path:
    """`runs/<data>-<model>-<time>`."""
    model = re.sub(r"[^A-Za-z0-9.]+", "-", config.model.rstrip("/").split("/")[-1]).strip("-")
    return Path("runs") / f"{config.data.stem}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def peak_memory_gib() -> float:
    """The GPU's peak allocation, or this process's peak resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _last_checkpoint(out: Path) -> str | None:
    """The newest whole checkpoint: the Trainer writes into its place, so the newest may be torn."""
    needed = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    folders = sorted((out / run_folder.CHECKPOINTS).glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    whole = [folder for folder in folders if all((folder / name).exists() for name in needed)]
    return str(whole[-1]) if whole else None


def _rehearsal(
    config, model, renderer: Renderer, out: Path, rows: list[Row], events: Events, resume: bool
) -> list[Row]:
    path = out / run_folder.CHECKPOINTS / "rehearsal.jsonl"
    if resume and path.exists():
        return load_rows(path)
    events.emit("phase", name="rehearse")
    found = rehearse(
        model,
        renderer,
        rehearsal_rows(config, len(rows)),
        seed=config.seed,
        max_new_tokens=min(MAX_REHEARSAL_TOKENS, max(len(row.ids) for row in rows)),
        progress=events.progress("rehearse"),
    )
    save_rows(path, found)
    return found


def _save_adapter(model: PeftModel, out: Path) -> None:
    beside = out / (run_folder.ADAPTER + ".part")
    model.save_pretrained(beside)
    shutil.rmtree(out / run_folder.ADAPTER, ignore_errors=True)
    beside.rename(out / run_folder.ADAPTER)


class _Tell(TrainerCallback):
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


@contextmanager
def _stop_on_ctrl_c(trainer: GuardedTrainer) -> Iterator[None]:
    """The first Ctrl-C saves a checkpoint after the step and stops; the second stops at once."""
    stopped = False

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if stopped:
                control.should_save = control.should_training_stop = True

    def handler(number, frame):
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    trainer.add_callback(Stop())
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if stopped:
        raise KeyboardInterrupt
