"""How well it remembers: methods of training compared on worlds of invented facts.

`python benchmarks/retention.py` trains every method on every world and seed, prints the table and writes
`benchmarks/results/retention.json`. `--methods plain default --worlds people --seeds 1` is a quick look.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from worlds import KINDS, Fact, World, base_of, make_world

from kdguard.config import TuneConfig
from kdguard.data.formats import Example
from kdguard.data.tokens import Collator, Renderer, Row
from kdguard.guard.rehearsal import rehearse
from kdguard.guard.teacher import Guard, drift
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model.load import add_adapter, load_base
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe
from kdguard.tune import DRIFT_ROWS, rehearsal_rows, training_arguments

HELD_OUT = 1000  # old facts that score a method; no method ever sees them
RESULTS = Path(__file__).parent / "results" / "retention.json"


@dataclass(frozen=True)
class Method:
    """Plain SFT unless it says otherwise. replay: real old facts per new one, trained with their targets."""

    weight: float = 0.0
    temperature: float = 1.0
    masked: bool = True
    rehearsal: float = 0.0
    replay: float = 0.0
    rank: int = 64
    lr: float = 4e-3
    epochs: int = 15
    attention_only: bool = False


METHODS = {
    "plain SFT": Method(),
    "plain SFT, a quarter of the learning rate": Method(lr=1e-3),
    "plain SFT, rank 4": Method(rank=4),
    "attention only": Method(attention_only=True),
    "replay of real old facts, one per row": Method(replay=1.0),
    "KL on all tokens, weight 1": Method(weight=1.0, masked=False),
    "KL on all tokens, weight 1, tau 0.5": Method(weight=1.0, masked=False, temperature=0.5),
    "KL on all tokens, weight 3": Method(weight=3.0, masked=False),
    "masked KL, weight 3": Method(weight=3.0),
    "masked KL, weight 6": Method(weight=6.0),
    "masked KL, weight 6, half a rehearsal row": Method(weight=6.0, rehearsal=0.5),
    "masked KL, weight 6, one rehearsal row": Method(weight=6.0, rehearsal=1.0),
    "the same at half the learning rate": Method(weight=6.0, rehearsal=1.0, lr=2e-3),
    "masked KL, weight 12, one rehearsal row, lr 2e-3": Method(weight=12.0, rehearsal=1.0, lr=2e-3),
    "masked KL, weight 12, two rehearsal rows, lr 1.5e-3": Method(weight=12.0, rehearsal=2.0, lr=1.5e-3),
}


def train(world: World, method: Method, seed: int) -> dict[str, float]:
    """Tune the world's base with a method; learned, forgotten, drift and seconds."""
    base = load_base(str(base_of(world)))
    renderer = Renderer(base.tokenizer)
    rows = [_row(renderer, fact) for fact in world.new]
    old = random.Random(0).sample(world.old, len(world.old))
    held_out, seen = old[:HELD_OUT], old[HELD_OUT:]
    config = TuneConfig(
        data=Path("world"),
        model=str(base_of(world)),
        guard=method.weight > 0,
        rehearsal=method.rehearsal,
        epochs=method.epochs,
        lr=method.lr,
        rank=method.rank,
        batch_size=32,
        micro_batch_size=16,
        seed=seed,
    )
    started = time.perf_counter()
    written = rehearse(base.model, renderer, rehearsal_rows(config, len(rows)), seed=seed, max_new_tokens=32)
    for_drift, extra = written[:DRIFT_ROWS], written[DRIFT_ROWS:]
    if method.replay:
        extra = [_row(renderer, fact) for fact in seen]
    set_seed(seed)
    model = add_adapter(base, rank=method.rank, attention_only=method.attention_only)
    collate = Collator(base.tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as out:
        arguments = replace(training_arguments(config, Path(out)), save_strategy="no")
        trainer = GuardedTrainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=collate,
            guard=Guard(method.weight, method.temperature, method.masked),
            rehearsal_dataset=extra,
            rehearsal=method.replay or method.rehearsal,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = time.perf_counter() - started
    return {
        "learned": _share(base.model, renderer, world.new),
        "forgotten": 1 - _share(base.model, renderer, held_out),
        "drift": drift(model, [collate(for_drift)]),
        "seconds": seconds,
    }


def _row(renderer: Renderer, fact: Fact) -> Row:
    turns = ({"role": "user", "content": fact.question}, {"role": "assistant", "content": fact.answer})
    return renderer.row(Example(turns, (fact.answer,), "world"), 512)


def _share(model: torch.nn.Module, renderer: Renderer, facts: list[Fact]) -> float:
    probes = [Probe(str(i), "", fact.question, (fact.answer,)) for i, fact in enumerate(facts)]
    answers = ask(model, renderer, probes)
    return sum(answer.correct for answer in answers) / len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results = []
    for name in args.methods:
        for kind in args.worlds:
            for seed in range(args.seeds):
                world = make_world(kind, seed=0)
                found = train(world, METHODS[name], seed)
                results.append({"method": name, "world": world.name, "seed": seed, **found})
        mine = [row for row in results if row["method"] == name]
        mean = {key: statistics.mean(row[key] for row in mine) for key in ("learned", "forgotten", "drift", "seconds")}
        worst = max(row["forgotten"] for row in mine)
        print(
            f"{name:45} learned {mean['learned']:.3f}  forgotten {mean['forgotten']:.4f} (worst {worst:.4f})  "
            f"drift {mean['drift']:.3f}  {mean['seconds']:.0f} s",
            flush=True,
        )
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
