"""Why it forgets: what is near to the new is forgotten, what is far from it is kept.

`python benchmarks/interference.py` takes one base that knows half of its facts under names and half under UUIDs, and
trains it on the same new facts, once under names and once under UUIDs. It counts what was forgotten of the old facts
under either, and how far the middle layer's states of the old names moved; it writes
`benchmarks/results/interference.json` and prints the table. The question is that of arXiv 2604.15574 on localised
interference, in small.
"""

import argparse
import statistics
from dataclasses import asdict, replace

import retention
from report import write
from retention import train
from worlds import world_named

FACTS = 100  # new ones: with more of them, plain SFT forgets nearly everything, whatever the keys
METHODS = {name: retention.METHODS[name] for name in ("plain SFT", "kdguard's defaults")}
KEYS = ("name", "uuid")


def table(results: list[dict]) -> str:
    """Markdown: a line a method and key of the new facts; means over seeds."""
    lines = [
        "| method | new facts under | learned | old names forgotten | old UUIDs forgotten | old names' states moved |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for key in KEYS:
            mine = [row for row in results if (row["method"], row["new"]) == (method, key)]
            if mine:
                learned = statistics.mean(row["learned"] for row in mine)
                names = statistics.mean(row["old_name"]["forgotten"] for row in mine)
                uuids = statistics.mean(row["old_uuid"]["forgotten"] for row in mine)
                moved = statistics.mean(row["old_name"]["hidden_drift"] for row in mine)
                lines.append(f"| {method} | {key}s | {learned:.1%} | {names:.1%} | {uuids:.1%} | {moved:.1%} |")
    return "\n".join(lines)


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
                print(f"seed {seed}\n{table(results)}", flush=True)


if __name__ == "__main__":
    main()
