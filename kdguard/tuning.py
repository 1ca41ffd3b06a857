"""The story of a run on one page: read, load, probe, rehearse, train, probe again, report."""

import json
import os
import platform
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, overload

from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from kdguard import processes
from kdguard.asking import DRIFT_ROWS, Asking, rehearsal_rows
from kdguard.config import TuneConfig
from kdguard.data.batches import Collator, pack
from kdguard.data.check import lengths
from kdguard.data.tokens import CHATML, Renderer
from kdguard.errors import InputError
from kdguard.events import Events, read_events
from kdguard.files import write_whole
from kdguard.fit import needed_gib
from kdguard.gpu import others
from kdguard.guard.budget import BudgetKeeper, settle
from kdguard.guard.checkpoint import last_whole
from kdguard.guard.lean import Lean
from kdguard.guard.teacher import Guard, drift
from kdguard.guard.trainer import GuardedTrainer
from kdguard.guard.warmup import warm_up
from kdguard.model.fingerprint import fingerprint
from kdguard.model.load import (
    add_adapter,
    default_lr,
    device,
    load_base,
    load_tokenizer,
    save_adapter,
    uuid,
)
from kdguard.model.memory import at_once, peak_memory_gib
from kdguard.model.packing import keeps_rows_apart
from kdguard.model.sharded import whole
from kdguard.probes.packs import load_probes
from kdguard.probes.watch import Allowance, split
from kdguard.processes import agreed, by_main
from kdguard.questions import new_questions, read_data, row_of
from kdguard.report import run as run_folder
from kdguard.report.build import build_report, write_report
from kdguard.report.contract import Report
from kdguard.report.warn import ces_in, few_known
from kdguard.resume import take_over
from kdguard.training import (
    Sample,
    SaveByTime,
    Stops,
    Tell,
    micro_batch_size,
    refuse_missing,
    trained_before,
    training_arguments,
)

USED = "give another --out, or --resume to go on with that run"


@overload
def tune(
    config: TuneConfig,
    events: Events | None = None,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    dry_run: Literal[False] = False,
    same_base: Path | None = None,
) -> Report: ...
@overload
def tune(
    config: TuneConfig,
    events: Events | None = None,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    dry_run: bool,
    same_base: Path | None = None,
) -> Any: ...
def tune(
    config: TuneConfig,
    events: Events | None = None,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    dry_run: bool = False,
    same_base: Path | None = None,
) -> Any:
    """Run `config` and return its report, which is also in its run folder. Nothing is written until all input is read.

    events: tells its listeners what happens (`kdguard.events`). resume: go on with the run in `config.out`.
    dry_run: return {`plan`, `config`} as `kdguard tune --dry-run --json` prints them, and write nothing.
    allow_changes: go on with a run though data, model, settings or libraries are not what it began with.
    same_base: a finished run of the same base, data and probes, whose base answers are taken over instead of asked.

    Raises InputError for anything wrong with the input, KdguardError for a run that fails, and
    KeyboardInterrupt, with the signal's number, after a checkpoint was saved.

    Several processes, each called with the same, all load, ask and train, for with sharded weights a forward takes all
    of them; what the main one found is what counts, and it alone writes.
    """
    if not config.data:
        raise InputError("no training data was named", "kdguard tune DATA")
    refuse_missing(config.report_to)
    events = events or Events()
    with Stops() as stops, ExitStack() as locked:
        events.listeners.append(stops.check)
        processes.join()
        micro_batch_size(config)
        if processes.sharded() and (config.budget is not None or config.teacher == "warmup"):
            raise InputError(
                "--budget and --teacher warmup change the adapter as a whole, which FSDP and DeepSpeed spread",
                "leave them out, or let every process hold all weights: examples/accelerate/ddp.yaml",
            )
        out = config.out or by_main(lambda: default_out(config))

        def begin() -> None:
            if resume:
                locked.enter_context(run_folder.at_work(out))
                run_folder.unfinished_config(out)
            else:
                run_folder.refuse_used(out, USED)

        by_main(begin)
        how = {"resume": resume, "allow_changes": allow_changes, "dry_run": dry_run, "same_base": same_base}
        return _tune(config.model_copy(update={"out": out}), events, stops, locked, **how)


def _tune(
    config: TuneConfig,
    events: Events,
    stops: Stops,
    locked: ExitStack,
    *,
    resume: bool,
    allow_changes: bool,
    dry_run: bool,
    same_base: Path | None,
) -> dict[str, Any]:
    started, out = time.time(), config.out
    probes = load_probes(config.probes)
    watched, scored = split(probes, config.seed, config.budget) if config.budget is not None else ([], probes)
    tokenizer = load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    renderer = Renderer(tokenizer)
    rows = processes.main_first(lambda: read_data(config, renderer, events))
    if device().type == "cuda":
        for what in others(uuid()):
            events.emit("warning", what=f"{what}: end it, or the run may run out of memory or be slow")
    events.emit("phase", name="load")
    base = load_base(
        config.model,
        quant=config.quant,
        revision=config.revision,
        tokenizer=tokenizer,
        embeddings=config.embeddings,
        trust_remote_code=config.trust_remote_code,
    )
    config = config.model_copy(update={"lr": config.lr or default_lr(base.model, config.goal)})
    new = new_questions(rows, config)
    longest = int(rows.lengths.max())
    packing = None
    if config.packing and keeps_rows_apart(base.model, [rows[0], rows[-1]]):
        packing = config.pack_tokens
    plan = {
        "model": config.model,
        "parameters": base.parameters,
        "device": device().type,
        "processes": processes.count(),
        "quant": config.quant,
        "template": "ChatML" if tokenizer.chat_template.endswith(CHATML) else "the tokenizer's own",
        "format": ", ".join(rows.formats),
        "rows": len(rows),
        "tokens": int(rows.lengths.sum()),
        "target_tokens": int(rows.targets.sum()),
        "lengths": lengths(rows.lengths),
        "cut": int((rows.cut > 0).sum()),
        "steps": config.epochs * -(-len(rows) // config.batch_size),
        "probes": len(scored),
        "watched": len(watched),
        "new_questions": len(new),
        "rehearsal_rows": rehearsal_rows(config, len(rows)),
        "packing": packing,
        "memory_gib": needed_gib(config.model_copy(update={"packing": bool(packing)}), base.model.config, longest),
        "out": str(out),
    }
    events.emit("plan", config=config.model_dump(mode="json"), **plan)
    if dry_run:
        return {"plan": plan, "config": config.model_dump(mode="json")}

    def begin() -> None:
        now = fingerprint(config, base, rows, probes)
        if resume:
            take_over(out, now, allow_changes=allow_changes)
        else:
            locked.enter_context(run_folder.at_work(out))
            run_folder.refuse_used(out, USED)  # by one that has come and gone since
        if not resume or allow_changes or config.shorten:  # which may have been said only now
            write_whole(out / run_folder.FINGERPRINT, json.dumps(now, indent=1) + "\n")
            write_whole(out / run_folder.CONFIG, config.to_yaml())

    by_main(begin)
    checkpoints = out / run_folder.CHECKPOINTS
    events.path = out / run_folder.EVENTS
    past = trained_before(read_events(events.path))
    events.emit("process", pid=os.getpid(), host=platform.node())

    asking = Asking(config, base.model, renderer, events, resume=resume, same_base=same_base)
    at_once.tell = events.leaner
    if resume:
        at_once.as_in(events.path)
    probes_before, new_before = asking.answers("probes", "before", scored), asking.answers("new", "before", new)
    doubts = few_known(sum(answer.correct for answer in probes_before), len(scored))
    for what in doubts:
        events.emit("warning", what=what)
    watched_before = asking.answers("watched", "before", watched) if watched else []
    at_once.tell = lambda what, **how: events.leaner(f"{what}; the base was asked in larger ones", **how)
    rehearsal = asking.rehearsal(rows)
    for_drift, rehearsal = rehearsal[:DRIFT_ROWS], rehearsal[DRIFT_ROWS:]

    set_seed(config.seed)
    model = asking.model = add_adapter(
        base,
        rank=config.rank,
        layers="attention output" if config.goal == "style" else "all",
        upper_half=config.layers == "upper-half",
    )
    padded = Collator(tokenizer.pad_token_id)
    collate = pack if packing else padded
    arguments = training_arguments(config, checkpoints)
    less = {"lean": Lean(offload=config.offload), "shorten": config.shorten, "on_step_down": events.leaner}
    guard = Guard(config.guard_weight if config.guard else 0.0, config.guard_temperature, config.guard_masked)
    if config.guard and config.teacher == "warmup":
        events.emit("phase", name="warm up")
        known_rows = rows.take([row_of(answer.id) for answer in new_before if answer.correct])
        guard.teacher = warm_up(model, known_rows, collate, arguments, resume=resume, packing=packing, **less)
    trainer = GuardedTrainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=collate,
        guard=guard,
        rehearsal_dataset=rehearsal,
        rehearsal=config.rehearsal if config.guard else 0.0,
        packing=packing,
        callbacks=[Tell(events, plan["steps"]), SaveByTime()],
        **less,
    )
    trainer.remove_callback(PrinterCallback)
    known_probes = [probe for probe, answer in zip(scored, probes_before, strict=True) if answer.correct]
    trainer.add_callback(Sample(events, known_probes, new, config.seed, asking.ask))
    keeper = None
    if config.budget is not None:
        known = {answer.id for answer in watched_before if answer.correct}
        keeper = BudgetKeeper(
            guard,
            lambda: len(known - asking.right(watched)),
            Allowance(config.budget, len(known)),
            checkpoints,
            events,
        )
        trainer.add_callback(keeper)
    events.emit("phase", name="train")
    training_started = time.perf_counter()
    checkpoint = by_main(lambda: last_whole(checkpoints)) if resume else None
    with stops.during(trainer, lambda: events.emit("stopping")):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = past + time.perf_counter() - training_started
    settled = None
    if keeper:
        events.emit("phase", name="settle")
        settled = settle(model, keeper, trainer.state.global_step, lambda: len(asking.right(new)))

    probes_after, new_after = asking.answers("probes", "after", scored), asking.answers("new", "after", new)
    if watched:
        asking.answers("watched", "after", watched)
    events.emit("phase", name="report")
    with whole(model):
        drifted = drift(model, for_drift, padded)
    report = build_report(
        config,
        settled=settled,
        probes=(probes_before, probes_after),
        new=(new_before, new_after),
        drift=drifted,
        ces=ces_in(events.path),
        cost={
            "steps": trainer.state.global_step,
            "tokens": plan["tokens"] * config.epochs,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(plan["tokens"] * config.epochs / seconds, 1),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "total_seconds": round(time.time() - started, 3),
            "leaner": [event["what"] for event in read_events(events.path) if event["event"] == "leaner"],
        },
    )
    for what in report["warnings"]:
        if what not in doubts:
            events.emit("warning", what=what)
    save_adapter(model, out / run_folder.ADAPTER)
    by_main(lambda: write_report(out, report, events))
    return agreed(report)


def default_out(config: TuneConfig) -> Path:
    """`runs/<data>-<model>-<time>`."""
    model = re.sub(r"[^A-Za-z0-9.]+", "-", config.model.rstrip("/").split("/")[-1]).strip("-")
    data = Path(config.data[0]).stem + (f"-and-{len(config.data) - 1}-more" if len(config.data) > 1 else "")
    return Path("runs") / f"{data}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
