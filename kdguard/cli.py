"""The commands: parse, call, print. Heavy imports live inside them, so that `--help` answers at once."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from kdguard import __version__
from kdguard.config import TuneConfig
from kdguard.errors import InputError

app = typer.Typer(
    name="kdguard",
    help="Fine-tune a language model on your own data without making it forget what it knew.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

OVER_BUDGET = 3
INTERRUPTED = 130


def _flag(field: str, *names: str) -> Any:
    """A `tune` flag: its help and default stand in TuneConfig."""
    info = TuneConfig.model_fields[field]
    default = (
        ""
        if info.is_required() or info.default is None or "[default" in (info.description or "")
        else f" [default: {info.default}]"
    )
    return typer.Option(*names, help=f"{info.description}{default}".replace("[", "\\["), show_default=False)


Json = Annotated[bool, typer.Option("--json", help="print JSON on standard output and nothing else")]


@app.command(
    epilog="kdguard tune facts.jsonl --preset qwen2.5-7b\n\nkdguard tune examples/new_facts.jsonl --model demo"
)
def tune(
    data: Annotated[
        list[str] | None, typer.Argument(help=TuneConfig.model_fields["data"].description, show_default=False)
    ] = None,
    columns: Annotated[str | None, _flag("columns", "--columns")] = None,
    last_turn: Annotated[bool | None, _flag("last_turn", "--last-turn/--all-turns")] = None,
    model: Annotated[str | None, _flag("model", "--model")] = None,
    revision: Annotated[str | None, _flag("revision", "--revision")] = None,
    preset: Annotated[str | None, _flag("preset", "--preset")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of these flags as keys")] = None,
    out: Annotated[Path | None, _flag("out", "--out")] = None,
    probes: Annotated[list[str] | None, _flag("probes", "--probes")] = None,
    prompts: Annotated[int | None, _flag("prompts", "--prompts")] = None,
    goal: Annotated[str | None, _flag("goal", "--goal")] = None,
    guard: Annotated[bool | None, _flag("guard", "--guard/--no-guard")] = None,
    guard_weight: Annotated[float | None, _flag("guard_weight", "--guard-weight")] = None,
    teacher: Annotated[str | None, _flag("teacher", "--teacher")] = None,
    rehearsal: Annotated[float | None, _flag("rehearsal", "--rehearsal")] = None,
    budget: Annotated[str | None, _flag("budget", "--budget")] = None,
    epochs: Annotated[int | None, _flag("epochs", "--epochs")] = None,
    lr: Annotated[float | None, _flag("lr", "--lr")] = None,
    batch_size: Annotated[int | None, _flag("batch_size", "--batch-size")] = None,
    micro_batch_size: Annotated[int | None, _flag("micro_batch_size", "--micro-batch-size")] = None,
    packing: Annotated[bool | None, _flag("packing", "--packing/--no-packing")] = None,
    max_length: Annotated[int | None, _flag("max_length", "--max-length")] = None,
    rank: Annotated[int | None, _flag("rank", "--rank")] = None,
    quant: Annotated[str | None, _flag("quant", "--quant")] = None,
    seed: Annotated[int | None, _flag("seed", "--seed")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --out from its last checkpoint")
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

        config, flags = unfinished_config(out), {"out": out}
    resolved = resolve(flags, config, has_gpu=_has_gpu)
    if control and not resolved.guard:
        raise InputError("--control adds a twin without the guard, and this run has none", "leave out --no-guard")
    terminal, events = _listening(as_json, resolved.model)

    from kdguard import tune as story

    runs = []
    try:
        report = story.tune(resolved, events, resume=resume, dry_run=dry_run)
        if not dry_run:
            runs = [events.path.parent]
        if control and runs:
            twin = runs[0].with_name(f"{runs[0].name}-control")
            story.tune(resolved.model_copy(update={"guard": False, "out": twin}), events, same_base=runs[0])
            runs = [twin, *runs]
    except KeyboardInterrupt:
        if events.path:
            fail(INTERRUPTED, "stopped by Ctrl-C", f"kdguard tune --resume --out {events.path.parent}")
        raise
    finally:
        terminal.close()
    if dry_run:
        import yaml

        print(
            json.dumps(report, indent=2) if as_json else "\n" + yaml.safe_dump(report["config"], sort_keys=False),
            end="",
        )
        return
    _show(runs, as_json)
    if report["budget"] and not report["budget"]["met"]:
        raise typer.Exit(OVER_BUDGET)


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
    terminal, events = _listening(as_json, "demo")

    from kdguard import tune as story

    for name, guard in (("plain", False), ("guarded", True)):
        if not as_json:
            console.rule(f"{name}: {'with' if guard else 'without'} the guard", align="left", characters="-")
        flags = {"data": data, "model": "demo", "guard": guard, "seed": seed, "out": folder / name}
        try:
            story.tune(resolve(flags), events, same_base=folder / "plain" if guard else None)
        finally:
            terminal.close()
    _compare([read_run(folder / "plain"), read_run(folder / "guarded")], as_json)
    if not as_json:
        console.print(f"\nnext        kdguard ui {folder / 'guarded'}", markup=False, soft_wrap=True)


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
    _compare(finished, as_json)
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
    out: Annotated[Path | None, typer.Option(help="run folder \\[default: runs/<adapter>-<time>]")] = None,
    probes: Annotated[list[str] | None, _flag("probes", "--probes")] = None,
    prompts: Annotated[int | None, _flag("prompts", "--prompts")] = None,
    quant: Annotated[str | None, _flag("quant", "--quant")] = None,
    seed: Annotated[int | None, _flag("seed", "--seed")] = None,
    as_json: Json = False,
) -> None:
    """Make a run folder for an adapter that another tool trained: what did it forget? Then dial, compare, look."""
    terminal, events = _listening(as_json, base or adapter)

    from kdguard import adopt as story

    settings = {"probes": probes, "prompts": prompts, "quant": quant, "seed": seed}
    try:
        path = story.adopt(adapter, events, base=base, data=data or (), out=out, **settings)
    finally:
        terminal.close()
    _show([path], as_json)


@app.command(epilog="kdguard explain runs/mine\n\nkdguard explain runs/mine --control")
def explain(
    run: Annotated[Path, typer.Argument(help="run folder")],
    control: Annotated[
        bool, typer.Option("--control", help="also train on facts that the base knows, and count what that forgets")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show which training rows made a run forget, and why: they lie nearest to what was forgotten."""
    from kdguard.report.run import read_run
    from kdguard.tables import print_explained
    from kdguard.terminal import console

    finished = read_run(run)
    terminal, events = _listening(as_json, finished.config["model"])

    from kdguard import explain as story

    try:
        found = story.explain(finished, events, control=control)
    finally:
        terminal.close()
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
    terminal, events = _listening(as_json, finished.config["model"])

    from kdguard import dial as story

    try:
        strengths = [step / steps for step in range(steps + 1)]
        points, chosen = story.dial(finished, strengths, events, budget=budget, choose=strength)
    finally:
        terminal.close()
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
    if budget is not None and not read_run(run).report["budget"]["met"]:
        raise typer.Exit(OVER_BUDGET)


class _AskByDefault(typer.core.TyperGroup):
    """`kdguard probe MODEL` is `kdguard probe ask MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["ask", *args]
        return super().parse_args(ctx, args)


probe = typer.Typer(cls=_AskByDefault, no_args_is_help=True, help="What a model knows; and packs of probes.")
app.add_typer(probe, name="probe", epilog="kdguard probe demo\n\nkdguard probe import popQA.tsv --out popqa.jsonl")


@probe.command(epilog="kdguard probe demo\n\nkdguard probe runs/mine --probes my_pack.jsonl --prompts 10")
def ask(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="hub id, local folder, `demo`, or a run folder")],
    probes: Annotated[list[str] | None, _flag("probes", "--probes")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="ways in which each probe is asked")] = 4,
    samples: Annotated[int, typer.Option(min=0, help="samples a way, of probes that no greedy answer gets right")] = 16,
    quant: Annotated[str | None, _flag("quant", "--quant")] = None,
    seed: Annotated[int, typer.Option(help="seed of the few-shot examples and the samples")] = 0,
    as_json: Json = False,
) -> None:
    """Show how well a model knows the probes, by category. It is what `kdguard probe MODEL` does.

    HighlyKnown: right in every way of asking. MaybeKnown: in some. WeaklyKnown: only when sampled. Unknown: never.
    """
    from dataclasses import asdict

    from kdguard.probes.packs import load_probes
    from kdguard.report.run import ADAPTER, REPORT, read_run
    from kdguard.tables import level_table
    from kdguard.terminal import console

    chosen = load_probes(probes or TuneConfig.model_fields["probes"].default)
    run = Path(model) if (Path(model) / REPORT).is_file() else None
    defaults = TuneConfig.model_fields
    config = read_run(run).config if run else {"model": model, "quant": defaults["quant"].default, "revision": None}
    name = config["model"]
    terminal, events = _listening(as_json, name)
    events.emit("phase", name="load")

    from kdguard.data.tokens import Renderer
    from kdguard.model.load import load_base, load_tuned, own_tokenizer
    from kdguard.probes.levels import grade

    tokenizer = own_tokenizer(run / ADAPTER) if run else None
    base = load_base(name, quant=quant or config["quant"], revision=config["revision"], tokenizer=tokenizer)
    if run:
        load_tuned(base, run / ADAPTER)
    events.emit("phase", name="grade")
    try:
        answers = grade(
            base.model,
            Renderer(base.tokenizer),
            chosen,
            prompts=prompts,
            samples=samples,
            seed=seed,
            progress=events.progress("grade"),
        )
    finally:
        terminal.close()
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=2))
    else:
        console.print(level_table(answers))


@probe.command("import", epilog="kdguard probe import popQA.tsv\n\nkdguard probe import P36.test.json --out mine.jsonl")
def import_(
    file: Annotated[Path, typer.Argument(help="EntityQuestions, PopQA, TriviaQA, or a file of --log_samples")],
    out: Annotated[Path | None, typer.Option(help="pack to write \\[default: FILE-probes.jsonl, here]")] = None,
) -> None:
    """Make a pack of a public question set, as it was downloaded."""
    from kdguard.files import write_jsonl
    from kdguard.probes.public import read_public
    from kdguard.terminal import console

    rows = read_public(file)
    path = out or Path(f"{file.stem}-probes.jsonl")
    if path.exists():
        raise InputError(f"{path}: this file is already there", "--out ANOTHER.jsonl")
    write_jsonl(path, rows)
    console.print(f"{len(rows):,} probes  {path}\nnext        kdguard probe MODEL --probes {path}", markup=False)


data = typer.Typer(no_args_is_help=True, help="Look at training data before a run.")
app.add_typer(data, name="data", epilog="kdguard data check facts.jsonl\n\nkdguard data check facts.jsonl --model demo")


@data.command(
    epilog="kdguard data check facts.jsonl\n\nkdguard data check facts.csv --columns question=Q,answer=A --fix "
    "cleaned.jsonl\n\nkdguard data check facts.jsonl --model demo --probes my_pack.jsonl"
)
def check(
    data: Annotated[list[str], typer.Argument(help=TuneConfig.model_fields["data"].description)],
    columns: Annotated[str | None, _flag("columns", "--columns")] = None,
    fix: Annotated[
        Path | None, typer.Option(help="write the rows that can be used, once each, with their encoding mended")
    ] = None,
    model: Annotated[str | None, _flag("model", "--model")] = None,
    probes: Annotated[list[str] | None, _flag("probes", "--probes")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="ways in which each question is asked")] = 4,
    max_length: Annotated[int | None, _flag("max_length", "--max-length")] = None,
    last_turn: Annotated[bool | None, _flag("last_turn", "--last-turn/--all-turns")] = None,
    quant: Annotated[str | None, _flag("quant", "--quant")] = None,
    as_json: Json = False,
) -> None:
    """Show what is wrong with DATA and where; with a model, what it already knows of DATA and what contradicts it.

    Exit code 2 if there are rows that cannot be used; with --fix they are left out.
    """
    from kdguard.config import resolve
    from kdguard.data import check as rows
    from kdguard.data.clean import clean, refuse_out
    from kdguard.findings import print_check, print_checked_by
    from kdguard.probes.packs import load_probes
    from kdguard.terminal import console

    if model is None and (probes or quant or max_length or last_turn):
        raise InputError(
            "--probes, --quant, --max-length and --last-turn are for a model, and none was named",
            "add --model FOLDER_OR_HUB_ID",
        )
    flags = {"data": data, "columns": columns, "probes": probes, "prompts": prompts, "quant": quant}
    flags |= {"max_length": max_length, "last_turn": last_turn}
    config = resolve(flags | {"model": model or "demo"})
    if fix:
        refuse_out(fix)
    if model is not None:
        load_probes(config.probes)
    terminal, events = _listening(as_json, config.model)
    cleaned: dict[str, int] = {}
    try:
        events.emit("phase", name="check")
        checked = rows.check(config.data, config.columns, events.progress("check"))
        terminal.close()
        if not as_json:
            print_check(console, checked)
        if fix:
            events.emit("phase", name="clean")
            cleaned = clean(config.data, fix, checked, config.columns, events.progress("clean"))
            terminal.close()
        found = checked.figures() | ({"fixed": cleaned} if fix else {})
        if model is not None and not checked.unusable:
            from kdguard import check as story

            found |= story.check(config, events)
    finally:
        terminal.close()
    if as_json:
        print(json.dumps(found, indent=2))
    elif model is not None and not checked.unusable:
        print_checked_by(console, found)
    if cleaned and not as_json:
        done = ", ".join(f"{n:,} {what}" for what, n in cleaned.items())
        console.print(f"\n{fix}: {done}", markup=False, soft_wrap=True)
    if checked.unusable and not fix:
        n = checked.counts[rows.UNUSABLE]
        hint = f"{checked.unusable.hint}; or --fix {Path(data[0]).stem}-cleaned.jsonl, which leaves such rows out"
        raise typer.Exit(fail(2, f"{n:,} row{'s' * (n > 1)} cannot be used", hint))
    if not as_json:
        names = " ".join([str(fix)] if fix else data)
        then = f"tune {names} --model {model}" if model else f"data check {names} --model MODEL"
        console.print(f"\nnext        kdguard {then}", markup=False, soft_wrap=True)


@data.command(
    epilog="kdguard data show facts.jsonl --model demo\n\nkdguard data show chats.jsonl --model demo --row 7 --row 9"
    "\n\nkdguard data show chats.jsonl --preset qwen2.5-7b --html rows.html"
)
def show(
    data: Annotated[list[str], typer.Argument(help=TuneConfig.model_fields["data"].description)],
    columns: Annotated[str | None, _flag("columns", "--columns")] = None,
    last_turn: Annotated[bool | None, _flag("last_turn", "--last-turn/--all-turns")] = None,
    model: Annotated[str | None, _flag("model", "--model")] = None,
    preset: Annotated[str | None, _flag("preset", "--preset")] = None,
    max_length: Annotated[int | None, _flag("max_length", "--max-length")] = None,
    row: Annotated[list[int] | None, typer.Option(min=1, help="show this row, counted from 1; repeatable")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="show so many, from the first \\[default: 3; with --html 20]")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with them instead")] = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model sees them: as tokens, and which of these are learned. No model is loaded.

    Exit code 2 if one of them cannot be used.
    """
    flags = {key: value for key, value in locals().items() if key in TuneConfig.model_fields}
    import shlex

    from kdguard.config import resolve

    if row and rows:
        raise InputError("--row chooses rows, and --rows is how many from the first", "give one of them")
    if html and html.is_dir():
        raise InputError(f"{html}: this is a folder", f"--html {html / 'rows.html'}")
    config = resolve(flags, has_gpu=_has_gpu)
    _quiet_libraries(show_downloads=config.model != "demo" and not Path(config.model).is_dir())

    from kdguard import show as story
    from kdguard.terminal import console

    shown, spread = story.show(config, rows or (20 if html else 3), row or ())
    broken = [each for each in shown if each.error]
    if html:
        story.write_page(html, shown, spread, config)
    if as_json:
        print(json.dumps([each.figures() for each in shown], indent=2))
    elif html:
        console.print(f"look at it  {html}", markup=False, soft_wrap=True)
    else:
        story.print_rows(console, shown, spread)
    if broken:
        code, names = InputError.exit_code, shlex.join(data)
        raise typer.Exit(fail(code, f"{len(broken):,} of these rows cannot be used", f"kdguard data check {names}"))
    if not as_json:
        asked = {"--model": model, "--preset": preset, "--columns": columns, "--max-length": max_length}
        words = [str(word) for pair in asked.items() if pair[1] is not None for word in pair]
        then = shlex.join([*data, *words, *(["--last-turn"] if last_turn else [])])
        console.print(f"\nnext        kdguard tune {then}", markup=False, soft_wrap=True)


@app.command(epilog="kdguard ui runs/mine\n\nkdguard ui runs/mine --port 7861")
def ui(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    port: Annotated[int, typer.Option(help="port on 127.0.0.1")] = 7860,
) -> None:
    """Look at a run in the browser: both answers side by side, and one box that asks both."""
    from kdguard.report.run import read_run

    finished = read_run(run)
    _quiet_libraries(show_downloads=False)
    from kdguard.terminal import console
    from kdguard.ui.page import serve

    serve(finished, port, lambda address: console.print(f"{address}  Ctrl-C ends it", soft_wrap=True))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    if version:
        print(f"kdguard {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def fail(code: int, message: str, hint: str) -> int:
    """Say what went wrong and the next thing to type; returns the exit code."""
    from kdguard.terminal import print_error

    print_error(message, hint)
    return code


def _listening(as_json: bool, model: str) -> tuple[Any, Any]:
    """A terminal that listens to a run's events, on standard error when standard output is for JSON."""
    from kdguard.events import Events
    from kdguard.terminal import Terminal, console, err

    in_hub = model != "demo" and not Path(model).is_dir()
    _quiet_libraries(show_downloads=in_hub)
    terminal = Terminal(err if as_json else console, show_load=not in_hub)
    return terminal, Events(terminal)


def _show(paths: list[Path], as_json: bool) -> None:
    """What a command has just written: the last run's report alone as JSON, or all of them as tables."""
    from kdguard.report.run import read_run

    runs = [read_run(path) for path in paths]
    if as_json:
        print(json.dumps(runs[-1].report, indent=2))
    else:
        _compare(runs, as_json=False)


def _compare(runs: list[Any], as_json: bool) -> None:
    from kdguard.report.build import verdict
    from kdguard.tables import print_comparison, print_run
    from kdguard.terminal import console

    if as_json:
        print(json.dumps([{"run": str(run.path), **run.report} for run in runs], indent=2))
    elif len(runs) == 1:
        print_run(console, runs[0], verdict(runs[0].report))
    else:
        print_comparison(console, runs)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _quiet_libraries(*, show_downloads: bool) -> None:
    """The libraries' own progress bars and notes would write over ours."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not show_downloads:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("transformers", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
