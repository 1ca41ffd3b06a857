"""The tables of the README and of `docs/`, and the pictures in it, from the results that the benchmarks wrote.

`python benchmarks/tables.py` puts the tables between their `<!-- table NAME -->` marks and writes the pictures;
`--check` only tells whether all are the same already.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from commands import commands
from figures import OURS, PLAIN, RESULTS, Row, groups, mean, read
from pictures import PICTURES

from kdguard import config
from kdguard.card import SIZES

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))


def worst(rows: Iterable[Row], key: str = "forgotten") -> float:
    return max(row[key] for row in rows)


def markdown(head: str, lines: Iterable[Iterable[str]]) -> str:
    """A table; `head` names its columns, separated by bars."""
    cells = [head.split("|"), ["---"] * len(head.split("|")), *lines]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in cells)


def times(rows: list[Row]) -> dict[str, float]:
    """Of each method, the median over the seeds of its seconds over plain SFT's."""
    plain = {row["seed"]: row["seconds"] for row in rows if row["method"] == PLAIN}
    return {
        method: statistics.median(row["seconds"] / plain[row["seed"]] for row in mine)
        for method, mine in groups(rows, "method").items()
    }


def worlds() -> str:
    """The defaults beside plain SFT."""
    lines = []
    for world, rows in groups(read("retention"), "world").items():
        of = groups(rows, "method")
        plain, ours = of[PLAIN], of[OURS]
        lines.append(
            [
                world.split("-")[0],
                f"{mean(plain, 'learned'):.1%}",
                f"{mean(plain, 'forgotten'):.1%}",
                f"{mean(ours, 'learned'):.1%}",
                f"{mean(ours, 'forgotten'):.2%} ({worst(ours):.1%})",
                f"{mean(plain, 'drift'):.3f} → {mean(ours, 'drift'):.3f}",
                f"{mean(plain, 'hidden_drift'):.1%} → {mean(ours, 'hidden_drift'):.1%}",
                f"{times(rows)[OURS]:.1f}x",
            ]
        )
    return markdown("world|plain SFT: learned|forgotten|kdguard: learned|forgotten (worst)|drift|moved|time", lines)


def methods() -> str:
    """Every method on the world that has them all."""
    rows = groups(read("retention"), "world")["mixed-names-0"]
    time = times(rows)
    lines = [
        [
            method,
            f"{mean(mine, 'learned'):.1%}",
            f"{mean(mine, 'forgotten'):.2%} ({worst(mine):.1%})",
            f"{mean(mine, 'drift'):.3f}",
            f"{mean(mine, 'hidden_drift'):.1%}",
            f"{time[method]:.1f}x",
        ]
        for method, mine in groups(rows, "method").items()
    ]
    return markdown("method|learned|forgotten (worst)|drift|moved|time", lines)


def interference() -> str:
    """What new facts under names, and under UUIDs, do to old ones under either."""
    lines = [
        [
            method,
            f"{key}s",
            f"{mean(mine, 'learned'):.1%}",
            *(f"{statistics.mean(row[old]['forgotten'] for row in mine):.1%}" for old in ("old_name", "old_uuid")),
            f"{statistics.mean(row['old_name']['hidden_drift'] for row in mine):.1%}",
        ]
        for method, rows in groups(read("interference"), "method").items()
        for key, mine in groups(rows, "new").items()
    ]
    return markdown("method|new facts under|learned|old names forgotten|old UUIDs forgotten|old names moved", lines)


def style() -> str:
    """What each goal makes of rows in a new format."""
    lines = [
        [
            f"`--goal {goal}`",
            f"{mean(mine, 'format'):.1%} ({mean(mine, 'format_held_out'):.1%})",
            f"{mean(mine, 'new_facts'):.1%} ({mean(mine, 'new_facts_before'):.1%})",
            f"{mean(mine, 'forgotten'):.2%} ({worst(mine):.1%})",
        ]
        for goal, mine in groups(read("style"), "goal").items()
    ]
    return markdown("goal|format (on held-out questions)|new facts (guessed by the base)|forgotten (worst)", lines)


def budget() -> str:
    """Budgets kept and what that cost."""
    lines = [
        [
            case,
            f"{sum(row['met'] for row in mine)} of {len(mine)} seeds",
            f"{mean(mine, 'forgetting'):.2%} ({worst(mine, 'forgetting'):.1%})",
            f"{mean(mine, 'learned'):.1%}",
        ]
        for case, mine in groups(read("budget"), "case").items()
    ]
    return markdown("guard|budget kept|forgotten (worst)|learned", lines)


def explain() -> str:
    """Forgotten probes that come back without the rows named for them, and without random ones."""
    lines = [
        [
            row["world"].split("-")[0],
            f"{row['forgotten']:.1%}",
            f"{row['back_named']:.1%} of {row['probes']}",
            f"{row['back_random']:.1%}",
            f"{row['p_value']:.4f}",
        ]
        for row in read("explain")
    ]
    return markdown("world|forgotten|back without the ten rows named|without ten random rows|Wilcoxon p", lines)


def probing() -> str:
    """Probes asked in batches beside one by one."""
    lines = [
        [
            f"{row['n']:,} of {row['probes']}",
            f"{row['seconds_batched']:.1f} s",
            f"{row['seconds_one_by_one']:.1f} s",
            f"{row['same_answers']:,}",
        ]
        for row in read("probing-cpu")
    ]
    return markdown("probes|in batches|one by one|same answers", lines)


def exported() -> str:
    """Exports beside the tuned model that they are of."""
    found = read("export")
    shares = [("tuned", found["tuned"], "", "")]
    shares += [(row["export"], row, f"{row['same']:,} of {row['n']:,}", f"{row['lost']:,}") for row in found["exports"]]
    lines = [[name, f"{of['learned']:.1%}", f"{of['forgotten']:.1%}", *rest] for name, of, *rest in shares]
    return markdown("export|learned|forgotten|answers as tuned, word for word|right answers lost", lines)


def data() -> str:
    """Large data, checked and tokenised."""
    lines = [
        [
            f"{row['work']}: {row['rows']:,} rows, {row['gb']:.2f} GB",
            f"{row['seconds']:,.1f} s",
            f"{row['rows_per_second']:,}",
            f"{row['peak_gib']:.2f} GiB",
        ]
        for row in read("data")
    ]
    return markdown("work|time|rows a second|peak memory", lines)


def step(name: str = "step-cpu") -> str:
    """A step with the guard over one without."""
    lines = [
        [mode, *(f"{row['over_guard_off']:.2f}" for row in sorted(mine, key=lambda row: row["checkpointing"]))]
        for mode, mine in groups(read(name), "mode").items()
    ]
    return markdown("a step's time|without activation checkpointing|with", lines)


def packing() -> str:
    """A step of short rows, padded and packed, over one without the guard that pads two at a time."""
    return step("packing-cpu")


def loss() -> str:
    """The loss beside its peers."""
    rows = read("loss-cpu")
    lines = [
        [
            name,
            *(
                f"{row['seconds']:.2f} s, {row['peak_mib']:,.0f} MiB ({row['peak_mib_at_twice_the_tokens']:,.0f})"
                for row in mine
            ),
        ]
        for name, mine in groups(rows, "loss").items()
    ]
    return markdown("|".join(["loss", *groups(rows, "head")]), lines)


PUBLISHED = {
    8: ("2,972", "out of memory"),
    12: ("21,848", "932"),
    16: ("40,724", "2,551"),
    24: ("78,475", "5,789"),
}  # tokens


def fit() -> str:
    """The longest rows by `kdguard fit`, and what Unsloth's documentation has for itself and for Hugging Face."""
    lines = [
        [f"{row['gb']} GB", f"{row['guarded']:,}", f"{row['guarded, --offload']:,}", *PUBLISHED[row["gb"]]]
        for row in read("fit")["longest"]
    ]
    head = "card|kdguard, guard on|the same, `--offload`|Unsloth, no teacher|Hugging Face, FlashAttention 2, no teacher"
    return markdown(head, lines)


def presets() -> str:
    """Every preset, with the longest rows by the card."""
    lines = []
    for name, preset in config.presets().items():
        memory = preset.get("memory", {})
        fits = [f"{memory[size]['max_length']:,}" if size in memory else "-" for size in SIZES]
        lines.append([f"`{name}`", preset["model"], preset["license"], *fits, preset["about"]])
    return markdown("preset|model|licence|" + "|".join(f"{size} GB" for size in SIZES) + "|", lines)


def gpu() -> str:
    """Memory and time on each GPU that was measured; `--tiny` is none."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("gpu-*.json"))]
    measured = [on_gpu(made) for made in every if not made["tiny"]]
    return "\n\n".join(measured) or "Not yet measured: there was no GPU. `python benchmarks/gpu.py` does it on one."


def on_gpu(made: Row) -> str:
    """The tables of one GPU: under the memory of smaller cards, the longest rows there, lengths, and its peers."""
    of = groups(made["results"], "group")
    under = [
        [
            row["model"],
            f"{row['cap_gib']:g} GiB",
            f"{row['length']:,}",
            speed(row),
            f"{row['peak_reserved_gib']:.2f} GiB" if row["status"] == "ok" else "",
        ]
        for row in of.get("caps", [])
    ]
    longest = []
    for cap, rows in groups((row for row in of.get("longest", []) if row["what"] == "guard on"), "cap_gib").items():
        ran = [row for row in rows if row["status"] == "ok" and not row["less_memory_by"]]
        others = (f"{rows[0][key]:,}" if rows[0][key] else "none" for key in ("unsloth_published", "hf_fa2_published"))
        best = max(ran, key=lambda row: row["length"], default=None)
        predicted = max(row.get("predicted_longest", 0) for row in rows)
        longest.append(
            [
                f"{cap:g} GiB",
                f"{predicted:,}" if predicted else "not run",
                f"{best['length']:,}" if best else "none",
                speed(best) if best else "",
                *others,
            ]
        )
    ways = ["guard off", "guard on", "guard on, kept states", "upper half"]
    lengths = []
    for model, rows in groups([*of.get("lengths", []), *of.get("upper half", [])], "model").items():
        for length, mine in sorted(groups(rows, "length").items()):
            by = {row["what"]: row for row in mine}
            lengths.append([model, f"{length:,}", *(cost(by[way]) if way in by else "" for way in ways)])
    peers = [[row["what"], f"{row['length']:,}", cost(row)] for row in of.get("peers", [])]
    ratios = [row["measured_over_estimate"] for row in made["results"] if "measured_over_estimate" in row]
    tables = {
        "model|card|tokens|with the guard|takes": under,
        "card|longest row by `kdguard fit`|that ran|with the guard|Unsloth, no teacher|Hugging Face + FA2": longest,
        "|".join(["model|tokens", *ways]): lengths,
        "beside it (llama3.1-8b)|tokens|plain": peers,
    }
    said = f"On one {made['machine']}, torch {made['torch']}"
    if ratios:
        said += f"; measured memory over `kdguard fit`'s: {min(ratios):.2f} to {max(ratios):.2f}"
    return "\n\n".join([f"{said}.", *(markdown(head, lines) for head, lines in tables.items() if lines)])


def speed(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"]
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s{', ' + row['less_memory_by'][-1] if row['less_memory_by'] else ''}"
    )


def cost(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"]
    return f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_allocated_gib']:.2f} GiB"


TABLES: dict[str, Callable[[], str]] = {
    each.__name__: each
    for each in (
        worlds,
        methods,
        interference,
        explain,
        style,
        budget,
        step,
        packing,
        data,
        probing,
        exported,
        loss,
        fit,
        presets,
        gpu,
        commands,
    )
}


def filled(text: str) -> str:
    """The text with every table between `<!-- table NAME -->` and `<!-- end -->` as the results have it."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda mark: f"{mark[1]}\n{TABLES[mark[2]]()}\n\n{mark[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a table would change")
    args = parser.parse_args()
    wanted = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES}
    wanted |= {ROOT / "docs" / f"{name}.svg": draw() for name, draw in PICTURES.items()}
    for path, text in wanted.items():
        if args.check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path.relative_to(ROOT)}: not what benchmarks/results say; run python benchmarks/tables.py")
        if not args.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
