"""How well it remembers: methods of training compared on worlds of invented facts and on the embedded model.

`python benchmarks/retention.py` trains every method on every world and seed and writes
`benchmarks/results/retention.json` after each; what is already there is not run again. `--table` prints the table of
what is there, `--methods default "plain SFT" --worlds people-names --seeds 0` takes a few.

Every method takes the same optimiser steps. Forgetting is counted on old facts that no method ever sees.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from report import RESULTS, write
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from worlds import Fact, World, base_of, world_named

from kdguard.config import TuneConfig
from kdguard.data.formats import Example
from kdguard.data.tokens import Collator, Renderer, Row
from kdguard.guard.rehearsal import rehearse
from kdguard.guard.teacher import Guard, drift, take_snapshot
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model.load import add_adapter, default_lr, load_base
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe
from kdguard.training import training_arguments
from kdguard.tune import DRIFT_ROWS, rehearsal_rows

HELD_OUT = 1000  # old facts that score a method; no method ever sees them
WORLDS = ["people-names-0", "places-names-0", "mixed-names-0", "people-uuids-0", "demo"]
SEEDS = [0, 1, 2]


@dataclass(frozen=True)
class Method:
    """Plain SFT unless it says otherwise.

    near: share of the rehearsal rows that start near a training question. replay: real old facts per new one, trained
    with their targets. warmup: the teacher is a snapshot after one pass over real old facts.
    """

    weight: float = 0.0
    temperature: float = 1.0
    masked: bool = True
    rehearsal: float = 0.0
    near: float = 0.0
    replay: float = 0.0
    warmup: bool = False
    lr: float | None = None
    rank: int = 64
    epochs: int = 8
    batch_size: int = 16
    attention_only: bool = False


METHODS = {
    "plain SFT": Method(),
}


def train(world: World, method: Method, seed: int) -> dict[str, float]:
    """Tune the world's base with a method; what it learned, forgot and cost."""
    base = load_base(base_of(world))
    renderer = Renderer(base.tokenizer)
    rows = [_row(renderer, fact) for fact in world.new]
    old = random.Random(0).sample(world.old, len(world.old))
    held_out, seen = old[:HELD_OUT], old[HELD_OUT:]
    known = _right(base.model, renderer, held_out)
    hidden = _hidden_states(base.model, renderer, held_out)
    config = TuneConfig(
        data=Path("world"),
        model="world",
        guard=method.weight > 0,
        rehearsal=method.rehearsal,
        epochs=method.epochs,
        lr=method.lr or default_lr(base.model),
        rank=method.rank,
        batch_size=method.batch_size,
        micro_batch_size=16,
        seed=seed,
    )
    longest = max(len(row.ids) for row in rows)
    for_drift = rehearse(base.model, renderer, DRIFT_ROWS, seed=1_000 + seed, max_new_tokens=longest)
    started = time.perf_counter()
    n = rehearsal_rows(config, len(rows)) - DRIFT_ROWS
    extra = rehearse(base.model, renderer, n, seed=seed, near=rows, near_share=method.near, max_new_tokens=longest)
    rehearsed = time.perf_counter() - started
    if method.replay:
        extra = [_row(renderer, fact) for fact in seen]
    set_seed(seed)
    model = add_adapter(base, rank=method.rank, attention_only=method.attention_only)
    collate = Collator(base.tokenizer.pad_token_id)
    guard = Guard(method.weight, method.temperature, method.masked)
    with tempfile.TemporaryDirectory() as out:
        arguments = replace(training_arguments(config, Path(out)), save_strategy="no")
        if method.warmup:
            known_rows = [_row(renderer, fact) for fact in seen[: len(rows)]]
            _fit(model, replace(arguments, num_train_epochs=1), known_rows, collate, Guard(0.0))
            take_snapshot(model, "teacher")
            guard.teacher = "teacher"
        _fit(model, arguments, rows, collate, guard, extra, method.replay or method.rehearsal)
    seconds = time.perf_counter() - started
    after = _right(base.model, renderer, held_out)
    forgotten = sum(was and not now for was, now in zip(known, after, strict=True))
    moved = 1 - torch.cosine_similarity(hidden, _hidden_states(base.model, renderer, held_out), dim=-1)
    return {
        "learned": sum(_right(base.model, renderer, world.new)) / len(world.new),
        "known": sum(known),
        "forgotten": forgotten / sum(known),
        "drift": drift(model, [collate(for_drift)]),
        "hidden_drift": moved.mean().item(),
        "seconds": seconds,
        "rehearsal_seconds": rehearsed,
    }


def _fit(model, arguments, rows, collate, guard, extra=(), rehearsal=0.0) -> None:
    trainer = GuardedTrainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=collate,
        guard=guard,
        rehearsal_dataset=list(extra),
        rehearsal=rehearsal,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _row(renderer: Renderer, fact: Fact) -> Row:
    turns = ({"role": "user", "content": fact.question}, {"role": "assistant", "content": fact.answers[0]})
    return renderer.row(Example(turns, fact.answers, "world"), 512)


def _right(model: torch.nn.Module, renderer: Renderer, facts: Sequence[Fact]) -> list[bool]:
    probes = [Probe(str(i), "", fact.question, fact.answers) for i, fact in enumerate(facts)]
    return [answer.correct for answer in ask(model, renderer, probes)]


@torch.no_grad()
def _hidden_states(model: torch.nn.Module, renderer: Renderer, facts: Sequence[Fact]) -> torch.Tensor:
    """The middle layer's state at the last token of each prompt, where the answer is looked up: (facts, hidden)."""
    middle = model.config.num_hidden_layers // 2
    states = []
    for fact in facts:
        ids = torch.tensor([renderer.prompt(fact.question)], device=model.device)
        states.append(model(input_ids=ids, output_hidden_states=True).hidden_states[middle][0, -1].float())
    return torch.stack(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=WORLDS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    args = parser.parse_args()
    path = RESULTS / "retention.json"
    results = json.loads(path.read_text())["results"] if path.exists() else []
    if args.table:
        print(table(results))
        return
    todo = [
        (seed, name, world)
        for seed in args.seeds
        for name in args.methods
        for world in args.worlds
        if not any(_same(result, name, world, seed) for result in results)
    ]
    for done, (seed, name, world) in enumerate(todo):
        found = train(world_named(world), METHODS[name], seed)
        results = [row for row in results if (row["method"], row["world"], row["seed"]) != (name, world, seed)]
        results.append({"method": name, **asdict(METHODS[name]), "world": world, "seed": seed, **found})
        write("retention", results)
        print(
            f"{done + 1}/{len(todo)}  {name:50} {world:15} seed {seed}  learned {found['learned']:.3f}  "
            f"forgotten {found['forgotten']:.2%}  {found['seconds']:.0f} s",
            flush=True,
        )


def _same(result: dict, name: str, world: str, seed: int) -> bool:
    """Whether a result is of this run, with the method as it is defined now."""
    settings = asdict(METHODS[name]).items()
    return (result["method"], result["world"], result["seed"]) == (name, world, seed) and settings <= result.items()


def table(results: list[dict]) -> str:
    """Markdown: a line a method, forgetting by world as mean over seeds (and the worst)."""
    worlds = [world for world in WORLDS if any(row["world"] == world for row in results)]
    lines = [
        "| method | learned | " + " | ".join(f"forgotten, {world}" for world in worlds) + " | drift | hidden | time |",
        "|---|---|" + "---|" * (len(worlds) + 3),
    ]
    for name in METHODS:
        mine = [row for row in results if row["method"] == name]
        if not mine:
            continue
        cells = []
        for world in worlds:
            shares = [row["forgotten"] for row in mine if row["world"] == world]
            cells.append(f"{statistics.mean(shares):.2%} ({max(shares):.1%})" if shares else "")
        mean = {key: statistics.mean(row[key] for row in mine) for key in ("learned", "drift", "hidden_drift")}
        # Against plain SFT of the same world and seed.
        plain = {(row["world"], row["seed"]): row["seconds"] for row in results if row["method"] == "plain SFT"}
        times = [row["seconds"] / plain[key] for row in mine if (key := (row["world"], row["seed"])) in plain]
        lines.append(
            f"| {name} | {mean['learned']:.1%} | {' | '.join(cells)} | {mean['drift']:.4f} | "
            f"{mean['hidden_drift']:.1%} | {statistics.median(times) if times else float('nan'):.1f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
