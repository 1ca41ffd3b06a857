"""Is `kdguard explain` right about the cause? Training again without the rows that it names.

`python benchmarks/explain.py` trains plain SFT on a world's first FACTS new facts. Then, for a sample of the probes
that were forgotten, it trains again without the ten rows named for the probe, and some times without ten random rows,
and counts how many of the probes come back. It writes `benchmarks/results/explain.json`. Any change of the rows brings
some back, so the random rows are what the named ones have to beat.
"""

import argparse
import random
from dataclasses import replace

import retention
from report import write
from retention import train
from scipy.stats import wilcoxon
from worlds import base_of, world_named

from kdguard.data.tokens import Renderer
from kdguard.model.load import load_base
from kdguard.probes.overlap import overlap, states

FACTS = 100  # as in `interference.py`: with more of them nearly everything is forgotten
NAMED = 10  # rows left out
PROBES = 40  # forgotten ones, each with a training of its own
RANDOM = 10  # trainings without random rows, each asked about all of those probes
WORLDS = ["mixed-names-0", "people-names-0", "places-names-0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=WORLDS, choices=WORLDS)
    args = parser.parse_args()
    results = []
    for name in args.worlds:
        world = world_named(name)
        new = world.new[:FACTS]

        def answers(left_out: set[int], world=world, new=new) -> list[bool]:
            rest = [fact for i, fact in enumerate(new) if i not in left_out]
            return list(train(replace(world, new=rest), retention.METHODS["plain SFT"], 0).after)

        full = train(replace(world, new=new), retention.METHODS["plain SFT"], 0)
        base = load_base(base_of(world))
        renderer = Renderer(base.tokenizer)
        old, rows = (
            states(base.model, [renderer.prompt(fact.question) for fact in facts]) for facts in (full.held_out, new)
        )
        named = overlap(old, rows).topk(NAMED).indices.tolist()
        forgotten = [i for i, (knew, knows) in enumerate(zip(full.before, full.after, strict=True)) if knew > knows]
        rng = random.Random(0)
        chosen = rng.sample(forgotten, PROBES)
        by_chance = [answers(set(rng.sample(range(FACTS), NAMED))) for _ in range(RANDOM)]
        back = []
        for done, i in enumerate(chosen, 1):
            back.append(answers(set(named[i]))[i])
            share = sum(back) / done
            chance = [sum(after[i] for after in by_chance) / RANDOM for i in chosen[:done]]
            print(
                f"{name:15} {done}/{PROBES}  back without the named rows {share:.1%}, without random ones "
                f"{sum(chance) / done:.1%}",
                flush=True,
            )
        differences = [float(here) - there for here, there in zip(back, chance, strict=True)]
        results.append(
            {
                "world": name,
                "forgotten": len(forgotten) / sum(full.before),
                "probes": PROBES,
                "back_named": share,
                "back_random": sum(chance) / PROBES,
                "p_value": float(wilcoxon(differences, alternative="greater").pvalue),
            }
        )
        write("explain", results)


if __name__ == "__main__":
    main()
