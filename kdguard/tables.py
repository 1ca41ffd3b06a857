"""What a person sees of results in the terminal: runs, answers, levels, findings.

Everybody's text is shown as it is: nothing in a model's answer or a data file styles or steers the terminal.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdguard.probes.score import LEVELS, Answer
from kdguard.report.compare import compare
from kdguard.report.contract import Report
from kdguard.report.figures import Pair
from kdguard.report.run import Run, read_exported, read_run
from kdguard.report.why import in_words
from kdguard.terminal import SHOWN, plain, warning_lines

T = TypeVar("T")


def print_run(out: Console, run: Run, verdict: str) -> None:
    """The verdict, the forgotten questions with both answers, the folder and the next command."""
    report = run.report
    out.print(f"\n[bold]{escape(verdict)}[/]")
    out.print(figures_table([(run.path.name, report)]))
    if told := report["kept"].get("told"):
        change = report["kept"]["change_ci95"]
        by = f"; right answers changed by {change[0]:+.1%} to {change[1]:+.1%} (95 %)" if change else ""
        out.print(f"{told[0].upper()}{told[1:]}{by}.")
    if found := report.get("warnings"):
        out.print(warning_lines(found))
    if any(each["runtime"] for each in report.get("exported", [])):
        out.print()
        out.print(export_table(report, report["exported"]))
    forgotten = [pair for pair in run.probes if pair.outcome == "forgotten"]
    if forgotten:
        out.print(answers_table("forgotten", forgotten))
    missed = [pair for pair in run.new if not pair.after.correct]
    if missed:
        out.print(answers_table("not learned", missed))
    out.print(f"\nrun folder  {escape(str(run.path))}", soft_wrap=True)
    out.print(f"look at it  {escape(str(run.path / 'report.html'))}", soft_wrap=True)
    explain = forgotten and report["data"]
    out.print(f"next        kdguard {'explain' if explain else 'ui'} {escape(str(run.path))}", soft_wrap=True)


def figures_table(reports: Sequence[tuple[str, Report]]) -> Table:
    """One line a run: learned, kept, forgotten, gained, drift, time."""
    table = Table(box=_box(), show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for name in ("learned", "kept", "forgotten", "95 %", "gained", "drift", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, report in reports:
        new, old = report["learned"], report["kept"]
        share = "-" if old["forgetting"] is None else f"{old['forgetting']:.1%}"
        interval = "-" if old["ci95"] is None else f"{old['ci95'][0]:.1%}–{old['ci95'][1]:.1%}"
        table.add_row(
            escape(name),
            f"{new['after']:.1%}" if new["n"] else "-",
            f"{old['kept']:,}/{old['known']:,}",
            share,
            interval,
            f"{old['gained']:,}",
            f"{report['drift']['nats_per_token']:.3f}",
            "-" if report["cost"]["seconds"] is None else f"{report['cost']['seconds']:.0f} s",
        )
    return table


def print_exported(out: Console, run: Run, entry: dict[str, Any]) -> None:
    """An export beside the base and the tuned model, what it was merged into, and what it answers otherwise."""
    for each in entry["tried"] if len(entry["tried"]) > 1 and entry["tried"][0]["n"] else ():
        chosen = "[bold]" if each["onto"] == entry["onto"] else ""
        lost = f"{each['lost']:,} of the tuned model's right answers lost"
        out.print(
            f"  {chosen}merged into {each['onto']}: {each['right']:,} of {each['n']:,} right, {lost}", soft_wrap=True
        )
    if entry["runtime"]:
        out.print()
        out.print(export_table(run.report, [entry]))
        counts = [(entry["lost"][what], name) for what, name in (("probes", "old"), ("new", "new"))]
        told = " and ".join(f"{count['count']:,} of {count['n']:,} {name} ones" for count, name in counts if count["n"])
        out.print(f"Of the tuned model's right answers it lost {told}. Asked through {escape(entry['runtime'])}.")
        exported = read_exported(run.path, read_run(run.path).report)
        changed = [
            Pair(pair.after, exported[pair.after.id])
            for pair in [*run.probes, *run.new]
            if pair.after.id in exported and exported[pair.after.id].answer != pair.after.answer
        ]
        if changed:
            out.print(answers_table("answered otherwise", changed, ("tuned", "exported")))
    out.print(f"\nexport      {escape(entry['path'])}", soft_wrap=True)


def export_table(report: Report, entries: Sequence[Mapping[str, Any]]) -> Table:
    """A line each for the base, the tuned model and what was exported of it."""
    table = Table(box=_box(), show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("")
    for name in ("learned", "kept", "forgotten", "gained", "word for word"):
        table.add_column(name, justify="right", no_wrap=True)
    known = report["kept"]["known"]
    asked = report["learned"]["n"]
    table.add_row("base", f"{report['learned']['before']:.1%}" if asked else "-", f"{known:,}/{known:,}", "-", "-", "-")
    for name, found in [("tuned", report), *((_export_name(each), each) for each in entries if each["runtime"])]:
        new, old, same = found["learned"], found["kept"], found.get("same")
        n, count = (sum(each[key] for each in same.values()) for key in ("n", "count")) if same else (0, 0)
        table.add_row(
            escape(name),
            f"{new['after']:.1%}" if new["n"] else "-",
            f"{old['kept']:,}/{old['known']:,}",
            "-" if old["forgetting"] is None else f"{old['forgetting']:.1%}",
            f"{old['gained']:,}",
            f"{count:,}/{n:,}" if same else "-",
        )
    return table


def _export_name(entry: Mapping[str, Any]) -> str:
    kind = {"merged": "", "adapter": " adapter" if entry["to"] != "adapter" else ""}[entry["weights"]]
    return f"{entry['to']}{kind}" + (f", {entry['type']}" if entry["type"] else "")


def dial_table(points: Sequence[dict[str, Any]], chosen: float | None) -> Table:
    """Learned and forgotten at each strength, as bars and shares."""
    table = Table(box=_box(), show_edge=False, pad_edge=False)
    most = max([point["forgetting"] or 0.0 for point in points] + [0.02])  # a full bar is at least 2 %
    watched = any(point["watched_known"] for point in points)
    for name in ("strength", "learned", "", "forgotten", "", *(("watched",) if watched else ())):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for point in points:
        mark = "[bold]" if point["strength"] == chosen else ""
        seen = f"{point['watched_forgotten']:,}/{point['watched_known']:,}"
        table.add_row(
            f"{mark}{point['strength']:g}",
            "-" if point["learned"] is None else f"{mark}{point['learned']:.1%}",
            Bar(1, 0, point["learned"] or 0.0, width=12, color="green"),
            "-" if point["forgetting"] is None else f"{mark}{point['forgetting']:.1%}",
            Bar(most, 0, point["forgetting"] or 0.0, width=12, color="red"),
            *((seen,) if watched else ()),
        )
    return table


def answers_table(title: str, pairs: Sequence[Pair], names: tuple[str, str] = ("base", "tuned")) -> Table:
    """Questions with both answers, the base's and the tuned model's unless `names` says otherwise."""
    all_known = all(pair.before.correct for pair in pairs)  # then the base's answer is the right one
    table = _answers(title, len(pairs))
    for name in (*(() if all_known else ("right",)), *names):
        table.add_column(name, overflow="fold", ratio=1, max_width=40)
    for pair in _spread(pairs):
        right = () if all_known else (plain(pair.before.answers[0]),)
        table.add_row(plain(pair.before.question), *right, _answer(pair.before), _answer(pair.after))
    _and_more(table, pairs)
    return table


def print_comparison(out: Console, runs: Sequence[Run]) -> None:
    """Several runs on the same questions: their figures, then every question on which they differ."""
    found = compare(runs)
    out.print()
    out.print(figures_table([(name, run.report) for name, run in zip(found.names, runs, strict=True)]))
    named = zip(found.names, runs, strict=True)
    if warnings := [f"{name}: {what}" for name, run in named for what in run.report.get("warnings", ())]:
        out.print(warning_lines(warnings))
    if found.differ is None:
        out.print("\nThese runs were asked different probes: only their figures stand beside each other.")
    elif found.differ:
        table = _answers("old knowledge forgotten by one of them", len(found.differ))
        for name in ("base", *found.names):
            table.add_column(escape(name), overflow="fold", ratio=1, max_width=40)
        for base, answers in _spread(found.differ):
            table.add_row(plain(base.question), *map(_answer, (base, *answers)))
        _and_more(table, found.differ)
        out.print()
        out.print(table)


def level_table(answers: Sequence[Answer]) -> Table:
    """How many probes of each category are known how well; `known` counts right answers to the question as it is."""
    table = Table(box=_box(), show_edge=False, show_footer=True, pad_edge=False)
    columns = {"known": lambda answer: answer.correct} | {
        level: lambda answer, level=level: answer.level == level for level in LEVELS
    }
    table.add_column("category", footer="all", overflow="fold")
    table.add_column("of", justify="right", footer=f"{len(answers):,}")
    for name, counts in columns.items():
        table.add_column(name, justify="right", footer=f"{sum(map(counts, answers)):,}", no_wrap=True)
    for category in dict.fromkeys(answer.category for answer in answers):
        mine = [answer for answer in answers if answer.category == category]
        table.add_row(
            escape(category), f"{len(mine):,}", *(f"{sum(map(counts, mine)):,}" for counts in columns.values())
        )
    return table


def print_explained(out: Console, found: dict[str, Any]) -> None:
    """The hypotheses with their figures, the rows named most often, and the nearest rows of some forgotten probes."""
    table = Table.grid(padding=(0, 2))
    for name, said in in_words(found).items():
        table.add_row(f"[bold]{name}[/]", escape(said))
    how_far = [
        f"{moved:.1%} for {name} ones" for name in ("forgotten", "kept") if (moved := found["moved"][name]) is not None
    ]
    table.add_row("[bold]moved[/]", f"states of old questions turned by {', '.join(how_far)} (1 - cosine)")
    out.print(table)
    if found["often"]:
        rows = Table(
            title="rows nearest to most of what was forgotten", title_justify="left", box=_box(), show_edge=False
        )
        rows.add_column("forgotten", justify="right")
        for name in ("row", "question", "answer"):
            rows.add_column(name, overflow="fold")
        for row in found["often"][: SHOWN // 2]:
            where = Path(row["where"]).name
            rows.add_row(f"{row['named']:,}", *map(plain, (where, row["question"], row["answer"])))
        out.print()
        out.print(rows)
    if found["probes"]:
        probes = Table(title=f"forgotten: {found['forgotten']:,}", title_justify="left", box=_box(), show_edge=False)
        for name in ("question", "base", "tuned", "nearest rows"):
            probes.add_column(name, overflow="fold")
        for probe in _spread(found["probes"]):
            nearest = "\n".join(plain(f"{row['question']} {row['answer']}") for row in probe["rows"][:3])
            probes.add_row(plain(probe["question"]), plain(probe["base"]), f"[red]{plain(probe['tuned'])}[/]", nearest)
        _and_more(probes, found["probes"])
        out.print()
        out.print(probes)


def _answers(title: str, n: int) -> Table:
    table = Table(title=f"{title}: {n:,}", title_justify="left", box=_box(), show_edge=False, expand=True)
    table.add_column("question", overflow="fold", ratio=2, max_width=60)
    return table


def _and_more(table: Table, items: Sequence[Any]) -> None:
    if more := len(items) - len(_spread(items)):
        table.add_row(f"[dim]and {more:,} more[/]")


def _spread(pairs: Sequence[T]) -> Sequence[T]:
    """At most SHOWN of them, from the whole list: neighbours are often of one category."""
    return pairs[:: -(-len(pairs) // SHOWN)]


def _answer(answer: Answer) -> str:
    return f"[{'green' if answer.correct else 'red'}]{plain(answer.answer) or '(nothing)'}[/]"


def _box() -> box.Box:
    """Lines where the console can show them; Windows' piped cp1252 cannot."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return box.SIMPLE_HEAD if encoding.startswith("utf") else box.ASCII2


def print_fit(out: Console, found: dict[str, Any]) -> None:
    """What a run takes as bars, whether it fits a card, and the longest rows that do."""
    guard = "guard on" if found["guard"] else "no guard"
    how = "in 16 bits, as on a GPU" if found["device"] == "gpu" else "in 32 bits, on this computer"
    model = f"[bold]{escape(found['model'])}[/], {found['quant']}, rank {found['rank']}, {guard}"
    out.print(f"{model}: {found['tokens_at_once']:,} tokens at once, {how}\n", soft_wrap=True)
    size = max(found["total_gib"], *(card["total"] for card in found["cards"][:1]))
    table = Table.grid(padding=(0, 2))
    begin = 0.0
    for line in found["lines"]:
        table.add_row(line["what"], f"{line['gib']:.2f} GiB", Bar(size, begin, begin + line["gib"], width=40))
        begin += line["gib"]
    table.columns[1].justify = "right"
    table.add_row(
        "[bold]in all[/]", f"[bold]{found['total_gib']:.2f} GiB[/]", Bar(size, 0, begin, width=40, color="cyan")
    )
    out.print(table)
    phases = ", ".join(f"{name} {gib:.2f}" for name, gib in found["phases"].items())
    out.print(f"\nat the worst moment of each phase, GiB: {phases}")
    for card in found["cards"]:
        says = "fits" if card["fits"] else "[red]does not fit[/]"
        rows = f"rows of up to {card['longest']:,} tokens would" if card["longest"] else "no row would, however short"
        out.print(f"{escape(card['name'])}, {card['room']:.1f} GiB free for it: {says}; {rows}")


def preset_table(presets: Sequence[dict[str, Any]], here: str) -> Table:
    """Presets with the longest rows that fit, by the card's memory; here: the GPU of this computer."""
    table = Table(box=_box(), show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("preset", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("licence", overflow="fold")
    for size in presets[0]["longest"]:
        table.add_column(here or f"{size} GB", justify="right")
    table.add_column("", overflow="fold")
    for preset in presets:
        lengths = (f"{length:,}" if length else "-" for length in preset["longest"].values())
        table.add_row(preset["preset"], preset["model"], preset["license"], *lengths, preset["about"])
    return table
