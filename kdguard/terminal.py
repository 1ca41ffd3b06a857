"""What a person sees of a run in the terminal: the plan, progress with time left, and the verdict."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from kdguard.events import Event
from kdguard.probes.score import LEVELS, Answer
from kdguard.report.compare import compare
from kdguard.report.figures import Pair
from kdguard.report.run import Run
from kdguard.report.why import in_words

T = TypeVar("T")

console = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

PHASES = {
    "load": "loading the base",
    "overlap": "comparing questions",
    "grade": "asking in other words",
    "ask probes before": "asking the base old questions",
    "ask new before": "asking the base the new questions",
    "ask watched before": "asking the base the watched questions",
    "warm up": "warming up on rows the base knows",
    "dial": "asking at each strength",
    "settle": "bringing it within the budget",
    "rehearse": "the base writes rehearsal rows",
    "train": "training",
    "ask probes after": "asking old questions again",
    "ask new after": "asking the new questions",
    "ask watched after": "asking the watched questions",
    "report": "writing the report",
}
SHOWN = 20  # rows of a table before it says how many more there are
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # they would steer the terminal


class Terminal:
    """A listener of events. It writes to `out`, so that `--json` can keep standard output for itself."""

    def __init__(self, out: Console, *, show_load: bool = True) -> None:
        self.out = out
        self.show_load = show_load  # not where the hub library shows its own bars of what it downloads
        whole = Column(no_wrap=True)  # in a narrow terminal the note is folded, and nothing else
        self.progress = Progress(
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=20, table_column=whole.copy()),
            MofNCompleteColumn(table_column=whole.copy()),
            TimeRemainingColumn(table_column=whole.copy()),
            TextColumn("{task.fields[note]}", table_column=Column()),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )
        self.task: Any = None
        self.sampled = self.watched = ""

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "phase" and (self.show_load or event["name"] != "load"):
            self._begin(PHASES[event["name"]])
        elif kind == "plan":
            self._end()
            self.out.print(plan_table(event))
        elif kind == "progress":
            self.progress.update(self.task, completed=event["done"], total=event["total"])
        elif kind == "loss":
            note = f"CE {event['ce']:.3f}, KL {event['kl']:.4f}{self.sampled}{self.watched}"
            self.progress.update(self.task, completed=event["step"], total=event["steps"], note=note)
        elif kind == "sampled":
            shares = event["learned"] / max(event["new"], 1), event["kept"] / max(event["known"], 1)
            self.sampled = f", learned {shares[0]:.0%}, kept {shares[1]:.0%}"
        elif kind == "watched":
            self.watched = f", watched forgot {event['forgotten']}/{event['known']}, weight {event['next_weight']:.3g}"
        elif kind == "answers":
            asked = {"probes": "old", "watched": "watched", "new": "new"}[event["of"]]
            who = "base" if event["when"] == "before" else "tuned"
            share = event["correct"] / max(event["n"], 1)
            self._end()
            self.out.print(f"  {who:5} answers {event['correct']:,} of {event['n']:,} {asked} questions ({share:.1%})")

    def close(self) -> None:
        self._end()

    def _begin(self, name: str) -> None:
        self._end()
        self.progress.start()
        self.task = self.progress.add_task(name, total=None, note="")

    def _end(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None
            self.progress.stop()


def plan_table(plan: dict[str, Any]) -> Table:
    config = plan["config"]
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{plan['model']}, {plan['parameters'] / 1e6:,.1f} M parameters, {plan['quant']} on {plan['device']}",
        "data": f"{config['data']}: {plan['rows']:,} {plan['format']} rows, {plan['tokens']:,} tokens, "
        f"{plan['target_tokens']:,} of them targets, longest {plan['longest']}",
        "template": plan["template"],
        "training": f"{plan['steps']:,} steps of {config['batch_size']} rows, {config['epochs']} epochs, "
        f"rank {config['rank']}, learning rate {config['lr']:g}",
        "guard": f"weight {config['guard_weight']:g}, teacher {config['teacher']}, "
        f"{plan['rehearsal_rows']:,} rows written by the base"
        if config["guard"]
        else "off: plain QLoRA",
        "questions": f"{plan['probes']:,} old, {plan['new_questions']:,} new, before and after"
        + (
            f"; {plan['watched']:,} more old ones watch the budget of {config['budget']:.2%}" if plan["watched"] else ""
        ),
        "memory": f"about {plan['memory_gib']:.1f} GiB at its peak",
        "run folder": plan["out"],
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    return table


def print_run(out: Console, run: Run, verdict: str) -> None:
    """The verdict, the forgotten questions with both answers, the folder and the next command."""
    report = run.report
    out.print(f"\n[bold]{escape(verdict)}[/]")
    out.print(figures_table([(run.path.name, report)]))
    if told := report["kept"].get("told"):
        change = report["kept"]["change_ci95"]
        by = f"; right answers changed by {change[0]:+.1%} to {change[1]:+.1%} (95 %)" if change else ""
        out.print(f"{told[0].upper()}{told[1:]}{by}.")
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


def figures_table(reports: Sequence[tuple[str, dict[str, Any]]]) -> Table:
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
            f"{mark}{point['learned']:.1%}",
            Bar(1, 0, point["learned"], width=12, color="green"),
            "-" if point["forgetting"] is None else f"{mark}{point['forgetting']:.1%}",
            Bar(most, 0, point["forgetting"] or 0.0, width=12, color="red"),
            *((seen,) if watched else ()),
        )
    return table


def answers_table(title: str, pairs: Sequence[Pair]) -> Table:
    """Questions with the base's and the tuned answers."""
    all_known = all(pair.before.correct for pair in pairs)  # then the base's answer is the right one
    table = _answers(title, len(pairs))
    for name in (*(() if all_known else ("right",)), "base", "tuned"):
        table.add_column(name, overflow="fold", ratio=1, max_width=40)
    for pair in _spread(pairs):
        right = () if all_known else (_plain(pair.before.answers[0]),)
        table.add_row(_plain(pair.before.question), *right, _answer(pair.before), _answer(pair.after))
    _and_more(table, pairs)
    return table


def print_comparison(out: Console, runs: Sequence[Run]) -> None:
    """Several runs on the same questions: their figures, then every question on which they differ."""
    found = compare(runs)
    out.print()
    out.print(figures_table([(name, run.report) for name, run in zip(found.names, runs, strict=True)]))
    if found.differ is None:
        out.print("\nThese runs were asked different probes: only their figures stand beside each other.")
    elif found.differ:
        table = _answers("old knowledge forgotten by one of them", len(found.differ))
        for name in ("base", *found.names):
            table.add_column(escape(name), overflow="fold", ratio=1, max_width=40)
        for base, answers in _spread(found.differ):
            table.add_row(_plain(base.question), *map(_answer, (base, *answers)))
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


def print_check(out: Console, found: dict[str, Any]) -> None:
    """What `data check` found: figures, and each finding on a line of its own that begins with `file:line`."""
    figures = {
        "data": f"{found['rows']:,} {found['format']} rows",
        "repeated": f"{len(found['duplicates']):,} rows",
        "contradicted": f"{len(found['contradictions']):,} rows, by an earlier one",
    }
    if "asked" in found:
        sample = f", out of {found['questions']:,} questions" if found["asked"] < found["questions"] else ""
        share = found["known"] / max(found["asked"], 1)
        figures |= {
            "known": f"{found['known']:,} of {found['asked']:,} asked ({share:.1%}){sample}",
            "facts": ", ".join(f"{n:,} {level}" for level, n in found["levels"].items()),
            "against base": f"{len(found['against_the_base']):,} rows, where another answer is HighlyKnown",
        }
    table = Table.grid(padding=(0, 2))
    for name, value in figures.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    out.print(table)
    for title, key, line in (
        ("repeated rows", "duplicates", "{where}: {question} -> {answer}, as in {against}"),
        ("contradictions in the data", "contradictions", "{where}: {question} -> {answer}, but {other} in {against}"),
        (
            "contradictions with the base",
            "against_the_base",
            "{where}: {question} -> {answer}, but the base says {other} ({against})",
        ),
    ):
        findings = found.get(key, ())
        if findings:
            out.print(f"\n[bold]{title}: {len(findings):,}[/]")
        for finding in findings[:SHOWN]:
            short = {name: _in_short(finding[name]) for name in ("question", "answer", "other")}
            out.print(_plain(line.format(**{**finding, **short})), soft_wrap=True)
        if len(findings) > SHOWN:
            out.print(f"[dim]and {len(findings) - SHOWN:,} more[/]")
    if found.get("at_risk"):
        out.print("\n[bold]first at risk: what it knows that lies nearest to what it does not[/]")
        for probe in found["at_risk"][: SHOWN // 2]:
            known, near = (_in_short(text) for text in (f"{probe['question']} {probe['answer']}", probe["near"]))
            out.print(_plain(f"{known}, near to: {near}"), soft_wrap=True)


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
            rows.add_row(f"{row['named']:,}", *map(_plain, (where, row["question"], row["answer"])))
        out.print()
        out.print(rows)
    if found["probes"]:
        probes = Table(title=f"forgotten: {found['forgotten']:,}", title_justify="left", box=_box(), show_edge=False)
        for name in ("question", "base", "tuned", "nearest rows"):
            probes.add_column(name, overflow="fold")
        for probe in _spread(found["probes"]):
            nearest = "\n".join(_plain(f"{row['question']} {row['answer']}") for row in probe["rows"][:3])
            probes.add_row(
                _plain(probe["question"]), _plain(probe["base"]), f"[red]{_plain(probe['tuned'])}[/]", nearest
            )
        out.print()
        out.print(probes)


def print_error(message: str, hint: str) -> None:
    err.print(f"[bold red]error[/] {escape(message)}", soft_wrap=True)
    if hint:
        err.print(f"  [bold]try[/] {escape(hint)}", soft_wrap=True)


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
    return f"[{'green' if answer.correct else 'red'}]{_plain(answer.answer) or '(nothing)'}[/]"


def _plain(text: str) -> str:
    """People's and models' text on one line, as it is: nothing in it styles or steers the terminal."""
    return escape(_CONTROL.sub(" ", " ".join(text.split())))


def _in_short(text: str) -> str:
    """Its beginning, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _box() -> box.Box:
    """Lines where the console can show them; Windows' piped cp1252 cannot."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return box.SIMPLE_HEAD if encoding.startswith("utf") else box.ASCII2
