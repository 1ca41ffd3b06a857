"""`kdguard data`: training data before a run."""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kdguard.cli.app import (
    Json,
    Trust,
    app,
    fail,
    flag,
    gpu_memory,
    listening,
    quiet_libraries,
)
from kdguard.config import TuneConfig
from kdguard.errors import InputError

data = typer.Typer(no_args_is_help=True, help="Look at training data before a run.")
app.add_typer(data, name="data", epilog="kdguard data check facts.jsonl\n\nkdguard data check facts.jsonl --model demo")


@data.command(
    epilog="kdguard data check facts.jsonl\n\nkdguard data check facts.csv --columns question=Q,answer=A --fix "
    "cleaned.jsonl\n\nkdguard data check facts.jsonl --model demo --probes my_pack.jsonl"
)
def check(
    data: Annotated[list[str], typer.Argument(help=TuneConfig.model_fields["data"].description)],
    columns: Annotated[str | None, flag("columns", "--columns")] = None,
    fix: Annotated[
        Path | None, typer.Option(help="write the rows that can be used, once each, with their encoding mended")
    ] = None,
    model: Annotated[str | None, flag("model", "--model")] = None,
    probes: Annotated[list[str] | None, flag("probes", "--probes")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="ways in which each question is asked")] = 4,
    max_length: Annotated[int | None, flag("max_length", "--max-length")] = None,
    last_turn: Annotated[bool | None, flag("last_turn", "--last-turn/--all-turns")] = None,
    quant: Annotated[str | None, flag("quant", "--quant")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what is wrong with DATA and where; with a model, what it already knows of DATA and what contradicts it.

    Exit code 2 if there are rows that cannot be used; with --fix they are left out.
    """
    from kdguard.config import resolve
    from kdguard.data import check as rows
    from kdguard.data.clean import clean, refuse_out
    from kdguard.findings import print_check, print_checked_by, print_cleaned
    from kdguard.probes.packs import load_probes
    from kdguard.terminal import console

    if model is None and (probes or quant or max_length or last_turn):
        raise InputError(
            "--probes, --quant, --max-length and --last-turn are for a model, and none was named",
            "add --model FOLDER_OR_HUB_ID",
        )
    flags = {"data": data, "columns": columns, "probes": probes, "prompts": prompts, "quant": quant}
    flags |= {"max_length": max_length, "last_turn": last_turn, "trust_remote_code": trust_remote_code}
    config = resolve(flags | {"model": model or "demo"})
    if fix:
        refuse_out(fix)
    if model is not None:
        load_probes(config.probes)
    cleaned = None
    with listening(as_json, config.model) as events:
        events.emit("phase", name="check")
        checked = rows.check(config.data, config.columns, events.progress("check"))
    if not as_json:
        print_check(console, checked)
    with listening(as_json, config.model) as events:
        if fix:
            events.emit("phase", name="clean")
            cleaned = clean(config.data, fix, checked, config.columns, events.progress("clean"))
        found = checked.figures()
        if cleaned:
            found["fixed"] = asdict(cleaned)
        if model is not None and not checked.unusable:
            from kdguard import check as story

            found |= story.check(config, events)
    if as_json:
        print(json.dumps(found, indent=2))
    elif model is not None and not checked.unusable:
        print_checked_by(console, found)
    if fix and cleaned and not as_json:
        print_cleaned(console, fix, cleaned)
    if checked.unusable and not fix:
        n = checked.counts[rows.UNUSABLE]
        left_out = f"; or --fix {Path(data[0]).stem}-cleaned.jsonl, which leaves such rows out" if checked.rows else ""
        hint = checked.unusable.hint + ("" if checked.ended else left_out)
        raise typer.Exit(fail(2, f"{n:,} row{'s' * (n > 1)} cannot be used", hint))
    if not as_json:
        asked: dict[str, Any] = {"--max-length": max_length}
        if not fix:
            asked["--columns"] = columns
        if model:
            asked |= {"--model": model, "--quant": quant}
        more = [("--probes", name) for name in probes or ()]
        then = _retyped([str(fix)] if fix else data, [*asked.items(), *more], last_turn)
        command = f"tune {then}" if model else f"data check {then} --model MODEL"
        console.print(f"\nnext        kdguard {command}", soft_wrap=True)


@data.command(
    epilog="kdguard data show facts.jsonl --model demo\n\nkdguard data show chats.jsonl --model demo --row 7 --row 9"
    "\n\nkdguard data show chats.jsonl --preset qwen2.5-7b --html rows.html"
)
def show(
    data: Annotated[list[str], typer.Argument(help=TuneConfig.model_fields["data"].description)],
    columns: Annotated[str | None, flag("columns", "--columns")] = None,
    last_turn: Annotated[bool | None, flag("last_turn", "--last-turn/--all-turns")] = None,
    model: Annotated[str | None, flag("model", "--model")] = None,
    preset: Annotated[str | None, flag("preset", "--preset")] = None,
    trust_remote_code: Trust = False,
    max_length: Annotated[int | None, flag("max_length", "--max-length")] = None,
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
    from kdguard.config import resolve

    if row and rows:
        raise InputError("--row chooses rows, and --rows is how many from the first", "give one of them")
    if html and html.is_dir():
        raise InputError(f"{html}: this is a folder", f"--html {html / 'rows.html'}")
    config = resolve(flags, memory=gpu_memory)
    quiet_libraries(show_downloads=config.model != "demo" and not Path(config.model).is_dir())

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
        console.print(f"\nnext        kdguard tune {_retyped(data, asked.items(), last_turn)}", soft_wrap=True)


def _retyped(data: Sequence[str], asked: Iterable[tuple[str, Any]], last_turn: bool | None) -> str:
    """The data and the flags that were given, to be typed again; nothing in them styles or steers the terminal."""
    from kdguard.terminal import plain

    words = [str(word) for name, value in asked if value for word in (name, value)]
    return plain(shlex.join([*data, *words, *["--last-turn"] * bool(last_turn)]))
