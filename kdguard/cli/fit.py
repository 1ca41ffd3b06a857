"""`kdguard fit` and `kdguard presets`: will it fit, before a byte is loaded."""

import json
from typing import Annotated, Any

import typer

from kdguard.cli.app import Json, app, flag, listening
from kdguard.config import TuneConfig
from kdguard.errors import InputError


@app.command(
    epilog="kdguard fit --preset llama3.1-8b --max-length 4096 --vram 12GB\n\nkdguard fit --model OWNER/NAME --no-guard"
)
def fit(
    model: Annotated[str | None, flag("model", "--model")] = None,
    preset: Annotated[str | None, flag("preset", "--preset")] = None,
    revision: Annotated[str | None, flag("revision", "--revision")] = None,
    max_length: Annotated[int | None, flag("max_length", "--max-length")] = None,
    micro_batch_size: Annotated[int | None, flag("micro_batch_size", "--micro-batch-size")] = None,
    packing: Annotated[bool | None, flag("packing", "--packing/--no-packing")] = None,
    guard: Annotated[bool | None, flag("guard", "--guard/--no-guard")] = None,
    rank: Annotated[int | None, flag("rank", "--rank")] = None,
    goal: Annotated[str | None, flag("goal", "--goal")] = None,
    quant: Annotated[str | None, flag("quant", "--quant")] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help="a card's memory, such as 8GB, in place of what is here")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell the memory that a run takes, line by line, and the longest rows that fit. Only the model's config is read."""
    flags: dict[str, Any] = {key: value for key, value in locals().items() if key in TuneConfig.model_fields}
    from kdguard import card
    from kdguard.config import resolve
    from kdguard.tables import print_fit
    from kdguard.terminal import console

    on = card.of_size(card.parse_size(vram)) if vram else card.here()
    config = resolve(flags, memory=lambda: on.total if on.gpu else None)
    if rank is not None and rank > 8192:
        raise InputError(f"--rank {rank}: more than any layer is wide", "--rank 64")
    with listening(as_json, "demo") as events:
        events.emit("phase", name="fit")
        from kdguard import fit as story

        of = story.config_of(config)
        gpu = on.gpu or config.model != "demo"  # what does not train on a CPU in a week is meant for a card
        needs = story.estimate(config, of, config.max_length, gpu=gpu)
        sizes = [on] if vram or on.gpu else [card.of_size(size) for size in card.SIZES] if gpu else []
        lengths = story.longest(config, of, [each.room * 2**30 for each in sizes], gpu=gpu) if sizes else []
