"""What a person sees while a command works: the plan, progress with time left, and errors."""

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from kdguard.doctor.check import OK, WARNING, WRONG, Check
from kdguard.events import Event

console = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

CHECK_COLOURS = {OK: "green", WARNING: "yellow", WRONG: "bold red"}
SHOWN = 20  # rows of a table, or findings of a kind, before it is said how many more there are
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # they would steer the terminal

PHASES = {
    "read": "reading rows, in MB",
    "check": "checking rows, in MB",
    "clean": "writing cleaned rows, in MB",
    "load": "loading the base",
    "fit": "running a step without data",
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
    "ask the driver": "asking the GPU's driver",
    "try libraries": "trying torch and bitsandbytes",
    "look around": "looking at disks and the hub",
}


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
            unit = 1_000_000 if PHASES[event["phase"]].endswith("in MB") else 1
            self.progress.update(self.task, completed=event["done"] // unit, total=event["total"] // unit)
        elif kind == "loss":
            note = f"CE {event['ce']:.3f}, KL {event['kl']:.4f}{self.sampled}{self.watched}"
            self.progress.update(self.task, completed=event["step"], total=event["steps"], note=note)
        elif kind == "sampled":
            shares = event["learned"] / max(event["new"], 1), event["kept"] / max(event["known"], 1)
            self.sampled = f", learned {shares[0]:.0%}, kept {shares[1]:.0%}"
        elif kind == "watched":
            self.watched = f", watched forgot {event['forgotten']}/{event['known']}, weight {event['next_weight']:.3g}"
        elif kind == "warning":
            self.out.print(warning_lines([event["what"]]))
        elif kind == "leaner":
            where = f"in step {event['step']:,}" if "step" in event else f"while {PHASES[event['phase']]}"
            self.out.print(f"  memory ran out {where}: {event['what']}; going on")
        elif kind == "stopping":
            self._end()
            self.out.print("  stopping: a checkpoint is being saved; once more ends it without")
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


def in_words(lengths: dict[str, int], unit: str = "tokens") -> str:
    """Percentiles of the rows' lengths."""
    half, most, nearly_all, longest = (f"{lengths[key]:,}" for key in ("median", "p90", "p99", "longest"))
    return f"half up to {half} {unit}, 90 % up to {most}, 99 % up to {nearly_all}, longest {longest}"


def plan_table(plan: dict[str, Any]) -> Table:
    config = plan["config"]
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{plan['model']}, {plan['parameters'] / 1e6:,.1f} M parameters, {plan['quant']} on {plan['device']}",
        "data": f"{', '.join(config['data'])}: {plan['rows']:,} rows of {plan['format']}, {plan['tokens']:,} tokens, "
        f"{plan['target_tokens']:,} of them targets",
        "lengths": in_words(plan["lengths"])
        + (f"; {plan['cut']:,} rows without the beginning of their conversation or prompt" if plan["cut"] else ""),
        "template": plan["template"],
        "training": f"{plan['steps']:,} steps of {config['batch_size']} rows, {config['epochs']} epochs, "
        f"rank {config['rank']}{' on the upper half of the layers' if config['layers'] == 'upper-half' else ''}, "
        f"learning rate {config['lr']:g}",
        "packing": f"rows packed, up to {plan['packing']:,} tokens at once"
        if plan["packing"]
        else f"off{': this model lets packed rows see each other' if config['packing'] else ''}",
        "guard": f"weight {config['guard_weight']:g}, teacher {config['teacher']}, "
        f"{plan['rehearsal_rows']:,} rows written by the base"
        if config["guard"]
        else "off: plain QLoRA",
        "questions": f"{plan['probes']:,} old, {plan['new_questions']:,} new, before and after"
        + (
            f"; {plan['watched']:,} more old ones watch the budget of {config['budget']:.2%}" if plan["watched"] else ""
        ),
        "memory": f"about {plan['memory_gib']:.1f} GiB at its peak"
        if plan["memory_gib"]
        else "not known for this architecture",
        "run folder": plan["out"],
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", plain(value))
    return table


def print_checks(out: Console, checks: Sequence[Check]) -> None:
    """What was found, a line each; then what mends it, unwrapped, to be copied."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(f"[{CHECK_COLOURS[check.state]}]{check.state}[/]", f"[bold]{check.what}[/]", plain(check.found))
    out.print(table)
    for state in (WRONG, WARNING):
        for check in checks:
            if check.state == state:
                out.print(f"\n[{CHECK_COLOURS[state]}]{state}[/]  [bold]{check.what}[/]")
                out.print(f"  {plain(check.mend)}", soft_wrap=True)
    wrong, warnings = (sum(check.state == state for check in checks) for state in (WRONG, WARNING))
    told = f"{warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
    out.print(f"\n{', '.join(filter(None, [f'{wrong} wrong' if wrong else 'nothing is wrong', told]))}")


def plain(text: str) -> str:
    """People's and models' text on one line, as it is: nothing in it styles or steers the terminal."""
    return escape(_CONTROL.sub(" ", " ".join(text.split())))


def warning_lines(warnings: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 1))
    for what in warnings:
        table.add_row(" [yellow]warning[/]", plain(what))
    return table


def print_error(message: str, hint: str) -> None:
    err.print(f"[bold red]error[/] {plain(message)}", soft_wrap=True)
    if hint:
        err.print(f"  [bold]try[/] {plain(hint)}", soft_wrap=True)
