"""What `--goal style` learns: a format, and hardly the facts in it.

`python benchmarks/style.py` takes a base that mostly answers in a word and sometimes in a sentence, and tunes it on
questions about facts it does not know, all answered in sentences: once for style and once for the facts. It writes
`benchmarks/results/style.json`. A fifth of the questions is held out: a format is learned when it comes there too. The
goal's epochs, rate and layers were chosen on seeds 0 to 2, so it runs on others.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from report import write
from worlds import SENTENCE, Fact, base_of, world_named

from kdguard.config import resolve
from kdguard.data.tokens import Renderer
from kdguard.events import Events
from kdguard.model.load import load_base, load_tuned
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe
from kdguard.probes.score import Answer
from kdguard.report.run import read_run
from kdguard.tuning import tune

HELD_OUT = 1000  # old facts


def in_format(answers: Sequence[Answer]) -> float:
    before, after = SENTENCE.split("{}")
    return sum(each.answer.startswith(before) and each.answer.endswith(after) for each in answers) / len(answers)


def probes_of(facts: Sequence[Fact]) -> list[Probe]:
    return [Probe(str(i), "people", fact.question, fact.answers) for i, fact in enumerate(facts)]


def measure(goal: str, seed: int, **flags) -> dict:
    """Tune for a goal; shares of answers in the format, of new facts learned, and of old ones forgotten."""
    world = world_named("people-forms-0")
    model = base_of(world)
    lessons = [fact for i, fact in enumerate(world.new) if i % 5]
    with tempfile.TemporaryDirectory() as folder:
        data, old, out = (Path(folder) / name for name in ("style.jsonl", "old.jsonl", "run"))
        rows = [{"question": fact.question, "answer": SENTENCE.format(fact.answers[0])} for fact in lessons]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        probes = probes_of(random.Random(0).sample(world.old, HELD_OUT))
        old.write_text("".join(json.dumps(vars(probe)) + "\n" for probe in probes))
        settings = {"data": data, "model": model, "probes": [str(old)], "goal": goal, "seed": seed, "out": out}
        report = tune(resolve({**settings, **flags}), Events())
        run = read_run(out)
        base = load_base(model)
        renderer = Renderer(base.tokenizer)
        guessed = ask(base.model, renderer, probes_of(lessons))
        load_tuned(base, out / "adapter")
        trained = ask(base.model, renderer, probes_of(lessons))
        unseen = ask(base.model, renderer, probes_of(world.new[::5]))
    return {
        "goal": goal,
        "seed": seed,
        "format_before": in_format(guessed),
        "format": in_format(trained),
        "format_held_out": in_format(unseen),
        "format_old": in_format([pair.after for pair in run.probes]),
        "new_facts": sum(answer.correct for answer in trained) / len(trained),
        "new_facts_before": sum(answer.correct for answer in guessed) / len(guessed),
        "guessed": sum(answer.correct for answer in unseen) / len(unseen),
        "forgotten": report["kept"]["forgetting"],
        "known": report["kept"]["known"],
        "seconds": report["cost"]["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        for goal in ("style", "facts"):
            found = measure(goal, seed)
            results.append(found)
            print(
                f"--goal {goal:5} seed {seed}  format {found['format']:.1%}, on held-out questions "
                f"{found['format_held_out']:.1%}, on old ones {found['format_old']:.1%}  new facts "
                f"{found['new_facts']:.1%} (before: {found['new_facts_before']:.1%})  forgotten "
                f"{found['forgotten']:.2%}  {found['seconds']:.0f} s",
                flush=True,
            )
            write("style", results)


if __name__ == "__main__":
    main()
