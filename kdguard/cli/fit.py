"""`kdguard fit` and `kdguard presets`: will it fit, before a byte is loaded."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from kdguard.cli.app import Json, Trust, app, flag, listening
from kdguard.config import TuneConfig

Vram = Annotated[str | None, typer.Option("--vram", help="a card's memory, such as 8GB, in place of what is here")]
NAMES = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "activations": "activations",
    "teacher": "teacher",
    "loss": "loss chunks",
    "answers": "probe generation",
}


@app.command(
    epilog="kdguard fit --preset llama3.1-8b --max-length 4096 --vram 12GB\n\nkdguard fit --model OWNER/NAME --no-guard"
)
def fit(
    model: Annotated[str | None, flag("model", "--model")] = None,
    preset: Annotated[str | None, flag("preset", "--preset")] = None,
    revision: Annotated[str | None, flag("revision", "--revision")] = None,
    trust_remote_code: Trust = False,
    max_length: Annotated[int | None, flag("max_length", "--max-length")] = None,
    micro_batch_size: Annotated[int | None, flag("micro_batch_size", "--micro-batch-size")] = None,
    packing: Annotated[bool | None, flag("packing", "--packing/--no-packing")] = None,
    guard: Annotated[bool | None, flag("guard", "--guard/--no-guard")] = None,
    embeddings: Annotated[str | None, flag("embeddings", "--embeddings")] = None,
    rank: Annotated[int | None, flag("rank", "--rank")] = None,
    goal: Annotated[str | None, flag("goal", "--goal")] = None,
    layers: Annotated[str | None, flag("layers", "--layers")] = None,
    quant: Annotated[str | None, flag("quant", "--quant")] = None,
    vram: Vram = None,
    as_json: Json = False,
) -> None:
    """Tell the memory that a run takes, line by line, and the longest rows that fit. Only the model's config is read.

    Where there is no GPU, a model of over a billion parameters is taken to be meant for one.
    """
    flags: dict[str, Any] = {key: value for key, value in locals().items() if key in TuneConfig.model_fields}
    from kdguard import card
    from kdguard.config import resolve
    from kdguard.tables import print_fit
    from kdguard.terminal import console

    on = card.of_size(card.parse_size(vram)) if vram else card.here()
    config = resolve(flags, memory=lambda: on.total if on.gpu else None)
    with listening(as_json, config.model) as events:
        events.emit("phase", name="fit")
        from kdguard import fit as story

        of = story.config_of(config)
        gpu = on.gpu or story.parameters(of) > 1e9
        needs = story.estimate(config, of, config.max_length, gpu=gpu)
        cards = [on] if on.gpu == gpu else [card.of_size(size) for size in card.SIZES]
        longest = story.longest(config, of, [each.room * 2**30 for each in cards], gpu=gpu)
    rows, tokens = story.tokens_at_once(config, config.max_length)
    found = {
        **{key: getattr(config, key) for key in ("model", "preset", "quant", "rank", "guard", "layers", "max_length")},
        "device": "gpu" if gpu else "cpu",
        "tokens_at_once": rows * tokens,
        "lines": [{"what": NAMES[name], "gib": round(size / 2**30, 3)} for name, size in needs.lines.items()],
        "total_gib": round(needs.total / 2**30, 3),
        "phases": {name: round(size / 2**30, 3) for name, size in needs.phases.items()},
        "cards": [
            {
                **asdict(each),
                "room": round(each.room, 3),
                "fits": needs.total <= each.room * 2**30,
                "longest": length,
            }
            for each, length in zip(cards, longest, strict=True)
        ],
    }
    if len(cards) == 1:
        found |= {"fits": found["cards"][0]["fits"], "longest": longest[0]}
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_fit(console, found)


@app.command(name="presets", epilog="kdguard presets\n\nkdguard presets qwen2.5-7b\n\nkdguard presets --vram 8GB")
def list_presets(
    name: Annotated[str | None, typer.Argument(help="one preset, whole", show_default=False)] = None,
    vram: Vram = None,
    as_json: Json = False,
) -> None:
    """Show the models that kdguard has settings for, and the longest rows with which they fit."""
    from kdguard import card
    from kdguard.config import by_memory, preset_file, presets
    from kdguard.tables import preset_table
    from kdguard.terminal import console

    if name:
        text = preset_file(name).read_text(encoding="utf-8")
        print(json.dumps(presets()[name], indent=2) if as_json else text, end="" if not as_json else "\n")
        return
    on = card.of_size(card.parse_size(vram)) if vram else card.here()
    sizes = [on.total] if on.gpu else list(card.SIZES)
    found = [
        {
            "preset": name,
            **{key: preset[key] for key in ("model", "license", "about")},
            "longest": {f"{size:g}": by_memory(preset, size).get("max_length", 0) for size in sizes},
        }
        for name, preset in presets().items()
        if "memory" in preset
    ]
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console.print(preset_table(found, f"{on.name}, {on.total:.0f} GB" if on.gpu else ""))
