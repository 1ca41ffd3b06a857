"""Is a budget kept? `kdguard tune --budget` on the embedded model, over ten seeds.

`python benchmarks/budget.py` runs the defaults, and a guard too weak for its budget that has to be driven, and writes
`benchmarks/results/budget.json`. Forgetting is that of the probes that did not watch.
"""

import argparse
import tempfile
from pathlib import Path

from report import write

from kdguard.config import resolve
from kdguard.events import Events
from kdguard.files import shipped
from kdguard.tuning import tune

CASES = {"the defaults": {}, "a weak guard": {"guard_weight": 2.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--budget", default="1%")
    args = parser.parse_args()
    results = []
    for case in args.cases:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as out:
                flags = {
                    "data": shipped("examples") / "new_facts.jsonl",
                    "model": "demo",
                    "seed": seed,
                    "budget": args.budget,
                    "prompts": 1,
                    "out": Path(out) / "run",
                    **CASES[case],
                }
                report = tune(resolve(flags), Events())
            results.append(
                {
                    "case": case,
                    "seed": seed,
                    "learned": report["learned"]["after"],
                    "forgetting": report["kept"]["forgetting"],
                    "known": report["kept"]["known"],
                    "strength": report["strength"],
                    **report["budget"],
                }
            )
            print(
                f"{case:26} seed {seed}  learned {report['learned']['after']:.1%}  forgot "
                f"{report['kept']['forgetting']:.2%} of {report['kept']['known']:,}  "
                f"{'kept' if report['budget']['met'] else 'NOT KEPT'}: {report['budget']['done']}",
                flush=True,
            )
            write("budget", results)
        mine = [result for result in results if result["case"] == case]
        print(f"{case:26} kept in {sum(result['met'] for result in mine)} of {len(mine)} seeds", flush=True)


if __name__ == "__main__":
    main()
