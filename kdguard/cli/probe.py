"""`kdguard probe`: what a model knows, and packs of probes."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kdguard.cli.app import (
    Json,
    Trust,
    app,
    flag,
    listening,
)
from kdguard.config import TuneConfig
from kdguard.errors import InputError


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
    probes: Annotated[list[str] | None, flag("probes", "--probes")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="ways in which each probe is asked")] = 4,
    samples: Annotated[int, typer.Option(min=0, help="samples a way, of probes that no greedy answer gets right")] = 16,
    quant: Annotated[str | None, flag("quant", "--quant")] = None,
    trust_remote_code: Trust = False,
    seed: Annotated[int, typer.Option(help="seed of the few-shot examples and the samples")] = 0,
    as_json: Json = False,
) -> None:
    """Show how well a model knows the probes, by category. It is what `kdguard probe MODEL` does.

    HighlyKnown: right in every way of asking. MaybeKnown: in some. WeaklyKnown: only when sampled. Unknown: never.
    """
    from dataclasses import asdict

    from kdguard.probes.packs import load_probes
    from kdguard.report.run import ADAPTER, FINGERPRINT, is_finished, read_run
    from kdguard.tables import level_table
    from kdguard.terminal import console

    chosen = load_probes(probes or TuneConfig.model_fields["probes"].default)
    run = Path(model) if is_finished(Path(model)) else None
    defaults = TuneConfig.model_fields
    config = read_run(run).config if run else {"model": model, "quant": defaults["quant"].default, "revision": None}
    name = config["model"]
    with listening(as_json, name) as events:
        events.emit("phase", name="load")

        from kdguard.data.tokens import Renderer
        from kdguard.model.fingerprint import of_base, refuse_other_base
        from kdguard.model.load import load_base, load_tuned, own_tokenizer
        from kdguard.model.memory import at_once
        from kdguard.probes.levels import grade

        tokenizer = own_tokenizer(run / ADAPTER) if run else None
        base = load_base(
            name,
            quant=quant or config["quant"],
            revision=config["revision"],
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )
        if run:
            refuse_other_base(run / FINGERPRINT, base.name, of_base(base), events)
            load_tuned(base, run / ADAPTER)
        at_once.tell = events.leaner
        events.emit("phase", name="grade")
        answers = grade(
            base.model,
            Renderer(base.tokenizer),
            chosen,
            prompts=prompts,
            samples=samples,
            seed=seed,
            progress=events.progress("grade"),
        )
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
