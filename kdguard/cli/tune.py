"""`kdguard tune` and `kdguard demo`."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kdguard import processes
from kdguard.cli.app import (
    INTERRUPTED,
    OVER_BUDGET,
    Json,
    Trust,
    app,
    compare_runs,
    fail,
    flag,
    gpu_memory,
    listening,
    show_runs,
)
from kdguard.config import TuneConfig
from kdguard.errors import InputError, KdguardError, OutOfMemory
from kdguard.events import Events


@app.command(
    epilog="kdguard tune facts.jsonl --preset qwen2.5-7b\n\nkdguard tune examples/new_facts.jsonl --model demo"
)
def tune(
    data: Annotated[
        list[str] | None, typer.Argument(help=TuneConfig.model_fields["data"].description, show_default=False)
    ] = None,
    columns: Annotated[str | None, flag("columns", "--columns")] = None,
    last_turn: Annotated[bool | None, flag("last_turn", "--last-turn/--all-turns")] = None,
    model: Annotated[str | None, flag("model", "--model")] = None,
    revision: Annotated[str | None, flag("revision", "--revision")] = None,
    trust_remote_code: Trust = False,
    preset: Annotated[str | None, flag("preset", "--preset")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of these flags as keys")] = None,
    out: Annotated[Path | None, flag("out", "--out")] = None,
    probes: Annotated[list[str] | None, flag("probes", "--probes")] = None,
    prompts: Annotated[int | None, flag("prompts", "--prompts")] = None,
    goal: Annotated[str | None, flag("goal", "--goal")] = None,
    layers: Annotated[str | None, flag("layers", "--layers")] = None,
    guard: Annotated[bool | None, flag("guard", "--guard/--no-guard")] = None,
    guard_weight: Annotated[float | None, flag("guard_weight", "--guard-weight")] = None,
    teacher: Annotated[str | None, flag("teacher", "--teacher")] = None,
    rehearsal: Annotated[float | None, flag("rehearsal", "--rehearsal")] = None,
    budget: Annotated[str | None, flag("budget", "--budget")] = None,
    epochs: Annotated[int | None, flag("epochs", "--epochs")] = None,
    lr: Annotated[float | None, flag("lr", "--lr")] = None,
    batch_size: Annotated[int | None, flag("batch_size", "--batch-size")] = None,
    micro_batch_size: Annotated[int | None, flag("micro_batch_size", "--micro-batch-size")] = None,
    packing: Annotated[bool | None, flag("packing", "--packing/--no-packing")] = None,
    max_length: Annotated[int | None, flag("max_length", "--max-length")] = None,
    embeddings: Annotated[str | None, flag("embeddings", "--embeddings")] = None,
    offload: Annotated[bool | None, flag("offload", "--offload/--no-offload")] = None,
    shorten: Annotated[bool | None, flag("shorten", "--shorten")] = None,
    rank: Annotated[int | None, flag("rank", "--rank")] = None,
    quant: Annotated[str | None, flag("quant", "--quant")] = None,
    seed: Annotated[int | None, flag("seed", "--seed")] = None,
    report_to: Annotated[str | None, flag("report_to", "--report-to")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="go on with the run in --out from its last checkpoint: the rest is as if it had not stopped",
        ),
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="go on though data, model, flags or libraries are not what it began with"),
    ] = False,
    control: Annotated[
        bool, typer.Option("--control", help="train the unguarded twin too, into OUT-control, and compare both")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved config and the plan; write nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Learn DATA, keep the rest; write a run folder with the proof."""
    flags = {key: value for key, value in locals().items() if key in TuneConfig.model_fields} | {"data": data or None}
    from kdguard.config import resolve

    if resume:
        if out is None:
            raise InputError("--resume needs the run to go on with", "kdguard tune --resume --out RUN")
        from kdguard.report.run import unfinished_config

        config = unfinished_config(out)
    elif allow_changes:
        raise InputError("--allow-changes is for a run that goes on", "add --resume, or leave it out")
    resolved = resolve(flags, config, memory=gpu_memory)
    if control and not resolved.guard:
        raise InputError("--control adds a twin without the guard, and this run has none", "leave out --no-guard")
    if control and resolved.out:
        from kdguard.report.run import refuse_used

        refuse_used(resolved.out.with_name(f"{resolved.out.name}-control"), "give another --out")
    runs = []
    with listening(as_json, resolved.model) as events:
        from kdguard import tuning as story

        trust = " --trust-remote-code" if resolved.trust_remote_code else ""
        may_shorten = not resolved.shorten and processes.count() == 1
        with _how_to_go_on(events, trust + (" --control" if control else ""), may_shorten=may_shorten):
            report = story.tune(resolved, events, resume=resume, allow_changes=allow_changes, dry_run=dry_run)
        if events.path:  # not of a dry run
            runs = [events.path.parent]
        if control and runs:
            twin = runs[0].with_name(f"{runs[0].name}-control")
            with _how_to_go_on(events, trust, may_shorten=may_shorten):
                story.tune(resolved.model_copy(update={"guard": False, "out": twin}), events, same_base=runs[0])
            runs = [twin, *runs]
    processes.leave()
    if dry_run and processes.is_main():
        import yaml

        print(
            json.dumps(report, indent=2) if as_json else "\n" + yaml.safe_dump(report["config"], sort_keys=False),
            end="",
        )
    elif processes.is_main():
        show_runs(runs, as_json)
    if not dry_run and report["budget"] and not report["budget"]["met"]:
        raise typer.Exit(OVER_BUDGET)


@contextmanager
def _how_to_go_on(events: Events, more: str = "", *, may_shorten: bool = False) -> Iterator[None]:
    """A run that ends before its end says so, with the command that goes on. more: flags of it."""
    go_on = f"{'accelerate launch ... -m ' if processes.count() > 1 else ''}kdguard tune --resume{more}"
    try:
        yield
    except KeyboardInterrupt as stop:
        number = next(iter(stop.args), signal.SIGINT)
        by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if events.path:
            fail(INTERRUPTED, f"stopped by {by}", f"{go_on} --out {events.path.parent}")
        else:
            fail(INTERRUPTED, f"stopped by {by}; nothing was written", "")
        raise typer.Exit(128 + number) from None  # of any KeyboardInterrupt typer makes 130
    except OutOfMemory as error:
        if events.path is None or events.phase not in ("warm up", "train") or not may_shorten:
            raise
        again = f"{go_on} --shorten --out {events.path.parent}"
        raise OutOfMemory(error.message, f"{again}, which cuts the longest rows; or {error.hint}") from None
    except OSError as error:
        where, what = error.filename or (events.path.parent if events.path else "a file"), error.strerror or error
        if events.path is None:
            raise InputError(f"{where}: {what}", "give another --out, or mend its permissions") from None
        again = f"{go_on} --out {events.path.parent}"
        raise KdguardError(f"{where}: {what}", f"free some space or mend its permissions, then {again}") from None


@app.command(epilog="kdguard demo\n\nkdguard demo --out runs/mine")
def demo(
    out: Annotated[Path | None, typer.Option(help="folder for both runs \\[default: runs/demo-<time>]")] = None,
    seed: Annotated[int, typer.Option(help="seed of both runs")] = 0,
    as_json: Json = False,
) -> None:
    """Tune the embedded model twice on invented facts, without and with the guard, and compare. Any CPU, minutes."""
    import time

    from kdguard.config import resolve
    from kdguard.files import shipped
    from kdguard.report.run import read_run
    from kdguard.terminal import console

    folder = out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    data = shipped("examples") / "new_facts.jsonl"
    for name, guard in (("plain", False), ("guarded", True)):
        if not as_json:
            console.rule(f"{name}: {'with' if guard else 'without'} the guard", align="left", characters="-")
        flags = {"data": data, "model": "demo", "guard": guard, "seed": seed, "out": folder / name}
        with listening(as_json, "demo") as events:
            from kdguard import tuning as story

            with _how_to_go_on(events):
                story.tune(resolve(flags), events, same_base=folder / "plain" if guard else None)
    compare_runs([read_run(folder / "plain"), read_run(folder / "guarded")], as_json)
    if not as_json:
        console.print(f"\nnext        kdguard ui {folder / 'guarded'}", markup=False, soft_wrap=True)
