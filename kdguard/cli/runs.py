"""What is done with a finished run: compare, adopt, explain, dial, look."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdguard.cli.app import (
    OVER_BUDGET,
    Json,
    Trust,
    app,
    compare_runs,
    fail,
    flag,
    listening,
    quiet_libraries,
    show_runs,
)
from kdguard.errors import InputError


@app.command(epilog="kdguard compare runs/mine\n\nkdguard compare runs/plain runs/guarded --html compared.html")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    html: Annotated[Path | None, typer.Option(help="write a page with a plot of learned and forgotten")] = None,
    as_json: Json = False,
) -> None:
    """Show old-knowledge answers before beside after, and several runs beside each other."""
    from kdguard.report.run import read_run

    finished = [read_run(path) for path in runs]
    if html and html.is_dir():
        raise InputError(f"{html}: this is a folder", f"--html {html / 'compared.html'}")
    if html:
        from kdguard.report.compare import write_comparison

        write_comparison(html, finished)
    compare_runs(finished, as_json)
    if html and not as_json:
        from kdguard.terminal import console

        console.print(f"\nlook at it  {html}", markup=False, soft_wrap=True)


@app.command(epilog="kdguard adopt my_lora\n\nkdguard adopt OWNER/NAME --data rows.jsonl --probes my_pack.jsonl")
def adopt(
    adapter: Annotated[str, typer.Argument(help="folder or hub id of a LoRA in PEFT's format")],
    base: Annotated[
        str | None, typer.Option(help="the model it belongs to \\[default: the one that its config names]")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="the rows it was trained on, to tell what it learned; repeatable")
    ] = None,
    columns: Annotated[str | None, flag("columns", "--columns")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder \\[default: runs/<adapter>-<time>]")] = None,
    probes: Annotated[list[str] | None, flag("probes", "--probes")] = None,
    prompts: Annotated[int | None, flag("prompts", "--prompts")] = None,
    quant: Annotated[str | None, flag("quant", "--quant")] = None,
    seed: Annotated[int | None, flag("seed", "--seed")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Make a run folder for an adapter that another tool trained: what did it forget? Then dial, compare, look."""
    settings = {
        "columns": columns,
        "probes": probes,
        "prompts": prompts,
        "quant": quant,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
    }
    with listening(as_json, base or adapter) as events:
        from kdguard import adopt as story

        path = story.adopt(adapter, events, base=base, data=data or (), out=out, **settings)
    show_runs([path], as_json)


@app.command(epilog="kdguard explain runs/mine\n\nkdguard explain runs/mine --control")
def explain(
    run: Annotated[Path, typer.Argument(help="run folder")],
    control: Annotated[
        bool, typer.Option("--control", help="also train on facts that the base knows, and count what that forgets")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show which training rows made a run forget, and why: they lie nearest to what was forgotten."""
    from kdguard.report.run import read_run
    from kdguard.tables import print_explained
    from kdguard.terminal import console

    finished = read_run(run)
    with listening(as_json, finished.config["model"]) as events:
        from kdguard import explain as story

        found = story.explain(finished, events, control=control, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_explained(console, found)
        console.print(f"\nlook at it  {run / 'report.html'}", markup=False, soft_wrap=True)


@app.command(
    epilog="kdguard dial runs/mine\n\nkdguard dial runs/mine --budget 1%\n\nkdguard dial runs/mine --strength 0.8"
)
def dial(
    run: Annotated[Path, typer.Argument(help="run folder")],
    budget: Annotated[str | None, typer.Option(help="write the best strength that forgets at most this")] = None,
    strength: Annotated[float | None, typer.Option(help="write this strength, more than 0 and at most 1")] = None,
    steps: Annotated[int, typer.Option(min=1, help="strengths measured above 0, evenly spaced")] = 10,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show learned and forgotten at several strengths of the adapter; write one of them. No training."""
    from kdguard.report.build import verdict
    from kdguard.report.run import read_run
    from kdguard.tables import dial_table
    from kdguard.terminal import console

    if budget is not None and strength is not None:
        raise InputError("--budget chooses a strength, and --strength is one", "give one of them")
    finished = read_run(run)
    with listening(as_json, finished.config["model"]) as events:
        from kdguard import dial as story

        strengths = [step / steps for step in range(steps + 1)]
        points, chosen = story.dial(
            finished, strengths, events, budget=budget, choose=strength, trust_remote_code=trust_remote_code
        )
    figures = [point.figures() for point in points]
    at = chosen.strength if chosen else None
    if as_json:
        print(json.dumps({"points": figures, "chosen": at}, indent=2))
    else:
        console.print(dial_table(figures, at))
        if at is not None:
            console.print(f"\nstrength {at:g} was written. {verdict(read_run(run).report)}", markup=False)
        console.print(f"\nlook at it  {run / 'report.html'}", markup=False, soft_wrap=True)
    if budget is not None and at is None:
        raise typer.Exit(fail(OVER_BUDGET, f"no strength keeps the budget of {budget}", "a looser --budget, or tune"))
    kept_to = read_run(run).report["budget"]
    if budget is not None and kept_to and not kept_to["met"]:
        raise typer.Exit(OVER_BUDGET)


@app.command(epilog="kdguard ui\n\nkdguard ui runs/mine --port 7861\n\nkdguard ui runs --host 0.0.0.0")
def ui(
    where: Annotated[
        Path, typer.Argument(metavar="[RUN_OR_FOLDER]", help="a run folder to open, or a folder of them")
    ] = Path("runs"),
    port: Annotated[int, typer.Option(help="port")] = 7860,
    host: Annotated[
        str, typer.Option(help="address to listen on; any but this computer's own asks for a password")
    ] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="a public address through Gradio, with a password")] = False,
    password: Annotated[
        str | None, typer.Option(help="for the user `kdguard` \\[default with --host or --share: a random one]")
    ] = None,
) -> None:
    """The studio in the browser: compare, ask, tune, and all runs."""
    quiet_libraries(show_downloads=False)
    from kdguard.report.run import CONFIG
    from kdguard.terminal import console
    from kdguard.ui.page import USER, serve
    from kdguard.ui.studio import Studio

    if where.exists() and not where.is_dir():
        raise InputError(f"{where}: this is a file", "name a run folder, or the folder of your runs")
    if not where.exists() and where != Path("runs"):
        raise InputError(f"{where}: no such folder", "kdguard ui, or name a run folder")
    run = where if (where / CONFIG).is_file() else None
    studio = Studio(run.resolve().parent if run else where)

    def ready(address: str, secret: str | None) -> None:
        entered = f"  user {USER}, password {secret}" if secret else ""
        console.print(f"{address}{entered}  Ctrl-C ends it", soft_wrap=True, markup=False)

    opened = run.resolve().name if run else None
    serve(studio, opened, port=port, host=host, share=share, password=password, ready=ready)
    for name in studio.training():
        console.print(f"{name} is still being trained; kdguard ui {where} finds it again", soft_wrap=True, markup=False)
    # Threads of libraries may be at work still, and one under which the interpreter ends aborts the process.
    shutil.rmtree(studio.scratch, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)
