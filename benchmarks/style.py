"""What `--goal style` learns: a format, and hardly the facts in it.

`python benchmarks/style.py` tunes the embedded model on questions about facts it does not know, each answered in a
format that it does not use, once with the attention alone adapted and once with every linear layer, and writes
`benchmarks/results/style.json`. A fifth of the questions is held out: a format is learned when it comes there too.
"""

import argparse
import json
import tempfile
from pathlib import Path

from report import write

from kdguard.config import resolve
from kdguard.data import formats
from kdguard.data.tokens import Renderer
from kdguard.events import Events
from kdguard.files import shipped
from kdguard.model.load import load_base, load_tuned
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe
from kdguard.report.run import read_run
from kdguard.tune import tune

BEFORE, AFTER = "The answer is ", "."


def in_format(answers: list[str]) -> float:
    return sum(answer.startswith(BEFORE) and answer.endswith(AFTER) for answer in answers) / len(answers)


def measure(goal: str, seed: int, **flags) -> dict:
    """Tune for a goal; shares of answers in the format, of new facts learned, and of old ones forgotten."""
    examples = formats.read(shipped("examples") / "new_facts.jsonl").examples
    held_out = examples[::5]
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "style.jsonl", Path(folder) / "run"
        rows = [
            {"question": example.question, "answer": f"{BEFORE}{example.answers[0]}{AFTER}"}
            for i, example in enumerate(examples)
            if i % 5
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = tune(
            resolve({"data": data, "model": "demo", "goal": goal, "seed": seed, "out": out, **flags}), Events()
        )
        run = read_run(out)
        base = load_base("demo")
        load_tuned(base, out / "adapter")
        probes = [Probe(str(i), "", example.question, example.answers) for i, example in enumerate(held_out)]
        unseen = ask(base.model, Renderer(base.tokenizer), probes)
    return {
        "goal": goal,
        "seed": seed,
        "format": in_format([pair.after.answer for pair in run.new]),
        "format_held_out": in_format([answer.answer for answer in unseen]),
        "format_old": in_format([pair.after.answer for pair in run.probes]),
        "new_facts": report["learned"]["after"],
        "forgotten": report["kept"]["forgetting"],
        "known": report["kept"]["known"],
        "seconds": report["cost"]["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        for goal in ("style", "facts"):
            found = measure(goal, seed)
            results.append(found)
            print(
                f"--goal {goal:5} seed {seed}  format {found['format']:.1%}, on held-out questions "
                f"{found['format_held_out']:.1%}, on old ones {found['format_old']:.1%}  new facts "
                f"{found['new_facts']:.1%}  forgotten {found['forgotten']:.2%}  {found['seconds']:.0f} s",
                flush=True,
            )
            write("style", results)


if __name__ == "__main__":
    main()
