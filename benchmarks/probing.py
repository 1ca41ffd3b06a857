"""What asking in batches saves: the same probes, all at once and one by one, and whether the answers are the same.

`python benchmarks/probing.py` asks the embedded model 1,000 probes of the pack `world` and those of `common` that offer
choices, and writes `benchmarks/results/probing-cpu.json` or `probing-cuda.json`. Times are medians of interleaved
rounds. Beside them stand the processor's seconds, which tell what other programs on the machine had no part in; for
that, set OMP_NUM_THREADS=1, for waiting threads count as busy.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence

import torch
from report import write

from kdguard.data.tokens import Renderer
from kdguard.model.load import Base, load_base
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe, load_probes

SAMPLE = 1000


def kinds() -> dict[str, list[Probe]]:
    """Probes to ask by what they are: answered in the model's own words, and chosen."""
    return {
        "world": random.Random(0).sample(load_probes(["world"]), SAMPLE),
        "common, with choices": [probe for probe in load_probes(["common"]) if probe.choices],
    }


def asked(base: Base, batches: Sequence[list[Probe]], name: str) -> tuple[float, float, list[str]]:
    """Seconds that it took, the processor's seconds, and the answers."""
    renderer = Renderer(base.tokenizer)
    answers: list[str] = []
    started, busy = time.perf_counter(), time.process_time()
    for i, batch in enumerate(batches, 1):
        answers += [answer.answer for answer in ask(base.model, renderer, batch)]
        if i % 250 == 0:
            print(f"  {name}: {i:,} of {len(batches):,}, {time.perf_counter() - started:.0f} s", flush=True)
    return time.perf_counter() - started, time.process_time() - busy, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    base = load_base("demo")
    results = []
    for name, probes in kinds().items():
        asked(base, [probes[:8]], name)  # libraries loaded, no more
        rounds, differing = [], set()  # seconds batched and one by one, then the processor's
        for _ in range(args.repeats):
            seconds, cpu, batched = asked(base, [probes], name)
            seconds_alone, cpu_alone, single = asked(base, [[probe] for probe in probes], name)
            rounds.append((seconds, seconds_alone, cpu, cpu_alone))
            differing |= {(probe.id, a, b) for probe, a, b in zip(probes, batched, single, strict=True) if a != b}
        together, alone, cpu, cpu_alone = map(statistics.median, zip(*rounds, strict=True))
        entry = {
            "probes": name,
            "n": len(probes),
            "seconds_batched": together,
            "seconds_one_by_one": alone,
            "batched_over_one_by_one": statistics.median(each[0] / each[1] for each in rounds),
            "cpu_seconds_batched": cpu,
            "cpu_seconds_one_by_one": cpu_alone,
            "cpu_batched_over_one_by_one": statistics.median(each[2] / each[3] for each in rounds),
            "rounds": rounds,
            "same_answers": len(probes) - len({probe for probe, _, _ in differing}),
            "differing": [{"id": i, "batched": a, "one_by_one": b} for i, a, b in sorted(differing)],
        }
        results.append(entry)
        print(
            f"{name:20} {len(probes):5,} probes  batched {together:6.1f} s  one by one {alone:6.1f} s  "
            f"ratio {entry['batched_over_one_by_one']:.3f}, of processor time "
            f"{entry['cpu_batched_over_one_by_one']:.3f}  {entry['same_answers']:,} answers the same",
            flush=True,
        )
        for probe, a, b in sorted(differing):
            print(f"  {probe}: {a!r} batched, {b!r} alone")
    write(f"probing-{'cuda' if torch.cuda.is_available() else 'cpu'}", results)


if __name__ == "__main__":
    main()
