"""Why it forgets: what is near to the new is forgotten, what is far from it is kept.

`python benchmarks/interference.py` takes one base that knows half of its facts under names and half under UUIDs, and
trains it on the same new facts, once under names and once under UUIDs. It counts what was forgotten of the old facts
under either, and how far the middle layer's states of the old names moved; it writes
`benchmarks/results/interference.json`. The question is that of arXiv 2604.15574 on localised interference, in small.
"""

import argparse
from dataclasses import asdict, replace

import retention
from report import write
from retention import train
from worlds import world_named

FACTS = 100  # new ones: with more of them, plain SFT forgets nearly everything, whatever the keys
METHODS = {name: retention.METHODS[name] for name in ("plain SFT", "kdguard's defaults")}
KEYS = ("name", "uuid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=retention.SEEDS)
    args = parser.parse_args()
    world = world_named("people-both-0")
    new = {"name": world.new[:FACTS], "uuid": world.renamed[:FACTS]}
    results: list[dict] = []
    for seed in args.seeds:
        for name, method in METHODS.items():
            for key in KEYS:
                trained = train(replace(world, new=new[key]), method, seed, held_out=2 * retention.HELD_OUT)
                results.append(
                    {
                        "method": name,
                        **asdict(method),
                        "seed": seed,
                        "new": key,
                        "learned": trained.learned,
                        **{f"old_{old}": trained.figures(old) for old in KEYS},
                        "drift": trained.drift,
                        "seconds": trained.seconds,
                    }
                )
                write("interference", results)
                names, uuids = (results[-1][f"old_{old}"]["forgotten"] for old in KEYS)
                print(
                    f"{name:20} seed {seed}  new facts under {key}s  learned {trained.learned:.1%}  "
                    f"forgotten: {names:.1%} of old names, {uuids:.1%} of old UUIDs",
                    flush=True,
                )


if __name__ == "__main__":
    main()
