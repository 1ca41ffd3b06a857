"""How well it remembers: methods of training compared on worlds of invented facts and on the embedded model.

`python benchmarks/retention.py` trains every method on every world and seed and writes
`benchmarks/results/retention.json` after each; what is already there is not run again.
`--methods "kdguard's defaults" "plain SFT" --worlds people-names-0 --seeds 0` takes a few.

Every method takes the same optimiser steps. Forgetting is counted on old facts that no method ever sees.
"""

import argparse
import json
import random
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

from kdguard.asking import DRIFT_ROWS, rehearsal_rows
from kdguard.config import TuneConfig, presets
from kdguard.data import IGNORE
from kdguard.data.batches import Collator
from kdguard.data.formats import Example
from kdguard.data.tokens import Renderer, Row
from kdguard.guard.rehearsal import answered, rehearse
from kdguard.guard.teacher import Guard, drift
from kdguard.guard.trainer import GuardedTrainer
from kdguard.guard.warmup import warm_up
from kdguard.model.load import add_adapter, default_lr, load_base
from kdguard.probes.answer import ask, generate
from kdguard.probes.packs import Probe
from kdguard.training import training_arguments

HELD_OUT = 1000  # old facts that score a method; no method ever sees them
LEARNING_RATES = {"demo": presets()["demo"]["lr"]}  # where the default is a preset's
WORLDS = ["people-names-0", "places-names-0", "mixed-names-0", "demo"]
SEEDS = [0, 1, 2]
_DEFAULT = {name: field.default for name, field in TuneConfig.model_fields.items()}


@dataclass(frozen=True)
class Method:
    """Plain SFT with the defaults of `kdguard tune`, unless it says otherwise.

    lesson: the guard's share on training rows. rehearsal: rows per training row; `spread` over the base's questions or
    sampled independently; `near` is the share of them that starts at a training question cut short. replay: real old
    facts per new one, trained with their targets. warmup: the teacher is a snapshot after one pass over real old facts.
    lr: as a factor of the default by the model's width.
    """

    weight: float = 0.0
    temperature: float = 1.0
    masked: bool = True
    lesson: float = Guard.lesson
    rehearsal: float = 0.0
    spread: bool = True
    near: float = 0.0
    replay: float = 0.0
    warmup: bool = False
    lr: float = 1.0
    rank: int = _DEFAULT["rank"]
    attention_only: bool = False


OURS = Method(weight=_DEFAULT["guard_weight"], rehearsal=_DEFAULT["rehearsal"])
METHODS = {
    "plain SFT": Method(),
    "kdguard's defaults": OURS,
    "plain, a quarter of the learning rate": Method(lr=0.25),
    "plain, rank 4": Method(rank=4),
    "plain, attention only": Method(attention_only=True),
    "replay of real old facts, 1 a row": Method(replay=1.0),
    "KL, weight 1": Method(weight=1.0, masked=False, lesson=1.0),
    "KL, weight 3": Method(weight=3.0, masked=False, lesson=1.0),
    "KL, weight 12": Method(weight=12.0, masked=False, lesson=1.0),
    "KL, weight 1, τ 0.5": Method(weight=1.0, masked=False, lesson=1.0, temperature=0.5),
    "the same, warm-up teacher (arXiv 2604.15574)": Method(
        weight=1.0, masked=False, lesson=1.0, temperature=0.5, warmup=True
    ),
    "masked KL, weight 3": Method(weight=3.0, lesson=1.0),
    "masked KL, weight 12": Method(weight=12.0, lesson=1.0),
    "defaults, gold token not masked": replace(OURS, masked=False),
    "defaults, full weight on training rows": replace(OURS, lesson=1.0),
    "defaults, rehearsal sampled independently": replace(OURS, spread=False),
    "defaults, half of the rehearsal near the data": replace(OURS, near=0.5),
    "defaults, half a rehearsal row": replace(OURS, rehearsal=0.5),
    "defaults, two rehearsal rows": replace(OURS, rehearsal=2.0),
    "defaults, weight 6": replace(OURS, weight=6.0),
    "defaults, weight 24": replace(OURS, weight=24.0),
    "defaults, half the learning rate": replace(OURS, lr=0.5),
    "defaults, twice the learning rate": replace(OURS, lr=2.0),
}


@dataclass(frozen=True)
class Trained:
    """What a method made of a world. `before` and `after`: whether each held-out old fact was answered rightly."""

    held_out: Sequence[Fact]
    before: Sequence[bool]
    after: Sequence[bool]
    moved: torch.Tensor  # (held-out facts,): 1 - cosine of their hidden states before and after
    learned: float
    drift: float
    seconds: float
    rehearsal_seconds: float

    def figures(self, key: str = "") -> dict[str, float]:
        """Known, forgotten and hidden drift over the held-out facts, or over those under one sort of key."""
        chosen = [i for i, fact in enumerate(self.held_out) if key in ("", fact.key)]
        known = sum(self.before[i] for i in chosen)
        return {
            "known": known,
            "forgotten": sum(self.before[i] and not self.after[i] for i in chosen) / known,
            "hidden_drift": self.moved[chosen].mean().item(),
        }


def train(world: World, method: Method, seed: int, held_out: int = HELD_OUT) -> Trained:
    """Tune the world's base with a method, and ask it for `held_out` old facts before and after."""
    base = load_base(base_of(world))
    renderer = Renderer(base.tokenizer)
    rows = [_row(renderer, fact) for fact in world.new]
    old = random.Random(0).sample(world.old, len(world.old))
    asked, seen = old[:held_out], old[held_out:]
    before = _right(base.model, renderer, asked)
    hidden = _hidden_states(base.model, renderer, asked)
    config = TuneConfig(
        data=Path("world"),
        model="world",
        guard=method.weight > 0,
        rehearsal=method.rehearsal,
        lr=method.lr * LEARNING_RATES.get(world.name, default_lr(base.model)),
        rank=method.rank,
        micro_batch_size=16,
        seed=seed,
    )
    longest = max(len(row.ids) for row in rows)
    for_drift = rehearse(base.model, renderer, DRIFT_ROWS, seed=1_000 + seed, max_new_tokens=longest)
    started = time.perf_counter()
    n = rehearsal_rows(config, len(rows)) - DRIFT_ROWS
    near = near_rows(base.model, renderer, rows, round(n * method.near), seed)
    free = rehearse(base.model, renderer, n - len(near), seed=seed, spread=method.spread, max_new_tokens=longest)
    extra = random.Random(seed).sample(near + free, len(near + free))
    rehearsed = time.perf_counter() - started
    if method.replay:
        extra = [_row(renderer, fact) for fact in seen]
    set_seed(seed)
    model = add_adapter(base, rank=method.rank, layers="attention" if method.attention_only else "all")
    collate = Collator(base.tokenizer.pad_token_id)
    guard = Guard(method.weight, method.temperature, method.masked, method.lesson)
    with tempfile.TemporaryDirectory() as out:
        arguments = replace(training_arguments(config, Path(out)), save_strategy="no")
        if method.warmup:
            known_rows = [_row(renderer, fact) for fact in seen[: len(rows)]]
            guard.teacher = warm_up(model, known_rows, collate, arguments)
        trainer = GuardedTrainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=collate,
            guard=guard,
            rehearsal_dataset=extra,
            rehearsal=method.replay or method.rehearsal,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = time.perf_counter() - started
    return Trained(
        held_out=asked,
        before=before,
        after=_right(base.model, renderer, asked),
        moved=1 - torch.cosine_similarity(hidden, _hidden_states(base.model, renderer, asked), dim=-1),
        learned=sum(_right(base.model, renderer, world.new)) / len(world.new),
        drift=drift(model, for_drift, collate),
        seconds=seconds,
        rehearsal_seconds=rehearsed,
    )


def near_rows(model: torch.nn.Module, renderer: Renderer, rows: Sequence[Row], n: int, seed: int) -> list[Row]:
    """Rehearsal rows whose questions begin as a training question does, up to a random token.

    A row that arrives at a training question itself is left out: there the guard would fight the lesson.
    """
    rng = random.Random(seed)
    prefix, ending = renderer.user_prefix(), renderer.after_user_turn()
    questions = [row.ids[len(prefix) : row.labels.count(IGNORE) - len(ending)] for row in rows]
    found: list[Row] = []
    while len(found) < n:
        starts = [prefix + (q := rng.choice(questions))[: rng.randrange(len(q))] for _ in range(min(512, n))]
        codes = [rng.random() for _ in starts]
        written = generate(model, renderer, starts, max_new_tokens=32, codes=codes, stop=ending[:1])
        asked = [start + rest for start, rest in zip(starts, written, strict=True)]
        asked = [prompt + ending for prompt in asked if prompt[len(prefix) :] not in questions]
        if asked:
            found += answered(model, renderer, asked, 32)
    return found[:n]


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
    prompts = [renderer.prompt(fact.question) for fact in facts]
    states: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for length in {len(prompt) for prompt in prompts}:
        places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in places], device=model.device)
        for i, state in zip(places, model(ids, output_hidden_states=True).hidden_states[middle][:, -1], strict=True):
            states[i] = state.float()
    return torch.stack(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=WORLDS, choices=WORLDS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    todo = [
        (seed, name, world)
        for seed in args.seeds
        for name in args.methods
        for world in args.worlds
        if not any(_same(result, name, world, seed) for result in _results())
    ]
    for done, (seed, name, world) in enumerate(todo):
        trained = train(world_named(world), METHODS[name], seed)
        found = {
            "learned": trained.learned,
            **trained.figures(),
            "drift": trained.drift,
            "seconds": trained.seconds,
            "rehearsal_seconds": trained.rehearsal_seconds,
        }
        results = [row for row in _results() if (row["method"], row["world"], row["seed"]) != (name, world, seed)]
        results.append({"method": name, **asdict(METHODS[name]), "world": world, "seed": seed, **found})
        results.sort(key=lambda row: (WORLDS.index(row["world"]), list(METHODS).index(row["method"]), row["seed"]))
        write("retention", results)
        print(
            f"{done + 1}/{len(todo)}  {name:50} {world:15} seed {seed}  learned {found['learned']:.3f}  "
            f"forgotten {found['forgotten']:.2%}  {found['seconds']:.0f} s",
            flush=True,
        )


def _results() -> list[dict]:
    path = RESULTS / "retention.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def _same(result: dict, name: str, world: str, seed: int) -> bool:
    """Whether a result is of this run, with the method as it is defined now."""
    settings = asdict(METHODS[name]).items()
    return (result["method"], result["world"], result["seed"]) == (name, world, seed) and settings <= result.items()


if __name__ == "__main__":
    main()
