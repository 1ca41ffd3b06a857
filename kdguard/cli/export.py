"""`kdguard export`: a run as what other programs load, asked again there."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdguard.cli.app import OVER_BUDGET, Json, app, fail, listening
from kdguard.errors import InputError

TO_ASK = "pip install llama-cpp-python, and export it again"


class Kind(StrEnum):
    merged = "merged"
    gguf = "gguf"
    ollama = "ollama"
    adapter = "adapter"


class Weights(StrEnum):
    merged = "merged"
    adapter = "adapter"


@app.command(
    epilog="kdguard export runs/mine --to merged --out mine\n\n"
    "kdguard export runs/mine --to gguf --quantize q4_k_m --llama-cpp ~/llama.cpp --out mine-gguf --budget 1%\n\n"
    "kdguard export runs/mine --to ollama --out mine-ollama && ollama create mine -f mine-ollama/Modelfile\n\n"
    "kdguard export runs/mine --to ollama --weights adapter --base llama3.1:8b-instruct-fp16 --out mine-ollama"
)
def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    to: Annotated[
        Kind, typer.Option("--to", help="a model folder, a GGUF file, an Ollama Modelfile, the PEFT adapter")
    ],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    weights: Annotated[
        Weights, typer.Option(help="of gguf and ollama: the whole model, or the adapter to put on its base there")
    ] = Weights.merged,
    quantize: Annotated[
        str | None, typer.Option(help="type of GGUF, such as q4_k_m or q8_0 \\[default: the base's own precision]")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="folder of llama.cpp, with its converters \\[default: where PATH finds them]")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="with --to ollama --weights adapter: what FROM names \\[default: the base's folder]"),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=0, help="ask at most so many old and so many new questions; 0 asks none")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="the largest share of the tuned model's right answers, old or new, that may get lost"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run as what other programs load, and ask it there all that the run was asked.

    It has the strength that the run has, see `kdguard dial`. Merged weights are tried on the base as it is published
    and on what its 4-bit weights stand for; the one that answers better is kept. The run's report gains the figures.
    Exit code 3 if more than the budget got lost; the export is left.
    """
    from kdguard.config import resolve
    from kdguard.report.exported import dropped
    from kdguard.report.run import CONFIG, read_run
    from kdguard.tables import print_exported
    from kdguard.terminal import console

    if to in (Kind.merged, Kind.adapter) and (quantize or llama_cpp or weights != Weights.merged):
        raise InputError(
            f"--quantize, --llama-cpp and --weights are for gguf and ollama, not for {to}",
            "--to gguf, or leave them out",
        )
    if base and (to != Kind.ollama or weights != Weights.adapter):
        raise InputError("--base names what an adapter is put on in Ollama", "--to ollama --weights adapter")
    if budget is not None and questions == 0:
        raise InputError("--budget needs questions, and --questions 0 asks none", "leave out one of them")
    finished = read_run(run)
    limit = None if budget is None else resolve({"budget": budget}, run / CONFIG).budget
    with listening(as_json, finished.config["model"]) as events:
        from kdguard import export as story

        wanted = story.Wanted(to.value, out, weights.value, quantize, llama_cpp, base, questions)
        entry = story.export(finished, wanted, events)
    if as_json:
        print(json.dumps(entry, indent=2))
    else:
        print_exported(console, finished, entry)
        if not entry["runtime"] and questions != 0:
            console.print(f"not asked   {TO_ASK}", markup=False, soft_wrap=True)
        file = next(iter(sorted(out.glob("*.gguf"))), out)
        typed = {
            Kind.ollama: f"ollama create NAME -f {out / 'Modelfile'}",
            Kind.gguf: f"llama-cli {'-m' if weights == Weights.merged else '-m BASE.gguf --lora'} {file}",
        }
        console.print(f"next        {typed.get(to, f'kdguard ui {run}')}", markup=False, soft_wrap=True)
    if limit is None:
        return
    if not entry["runtime"]:
        raise typer.Exit(fail(OVER_BUDGET, f"{out} was not asked, so the budget cannot be told", TO_ASK))
    if dropped(entry) > limit:
        message = (
            f"the export lost {dropped(entry):.1%} of the tuned model's right answers, over the budget of {budget}"
        )
        raise typer.Exit(fail(OVER_BUDGET, message, f"it is left in {out}; another --quantize, or --to merged"))
