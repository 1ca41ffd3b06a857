"""What a person sees of `data check` in the terminal. It imports no plots and no statistics: it answers at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdguard.data.check import Checked, beginning, lengths
from kdguard.data.clean import Cleaned
from kdguard.terminal import SHOWN, in_words, plain


def print_check(out: Console, checked: Checked) -> None:
    """What `data check` found in the rows: figures, and each finding on a line that begins with `file:line`."""
    figures = {"data": f"{checked.rows:,} rows of {', '.join(checked.formats) or 'no known format'}"}
    if checked.rows:
        figures["lengths"] = in_words(lengths(checked.characters), "characters")
    figures["found"] = ", ".join(f"{n:,} {kind}" for kind, n in checked.counts.items()) or "nothing wrong"
    out.print(_figures(figures))
    for kind, n in checked.counts.items():
        _print_findings(out, f"{kind}: {n:,}", [vars(finding) for finding in checked.findings[kind]], n)


def print_checked_by(out: Console, found: dict[str, Any]) -> None:
    """What `data check` found by asking the base."""
    sample = f", out of {found['questions']:,} questions" if found["asked"] < found["questions"] else ""
    share = found["known"] / max(found["asked"], 1)
    cut = f"; {found['cut']:,} rows without the beginning of their conversation or prompt" if found["cut"] else ""
    figures = {
        "tokens": in_words(found["tokens"]) + cut,
        "known": f"{found['known']:,} of {found['asked']:,} asked ({share:.1%}){sample}",
        "facts": ", ".join(f"{n:,} {level}" for level, n in found["levels"].items()),
        "against base": f"{len(found['against_the_base']):,} rows, where another answer is HighlyKnown",
    }
    out.print()
    out.print(_figures(figures))
    against = found["against_the_base"]
    _print_findings(out, f"contradictions with the base: {len(against):,}", against, len(against))
    if found["at_risk"]:
        out.print("\n[bold]first at risk: what it knows that lies nearest to what it does not[/]")
        for probe in found["at_risk"][: SHOWN // 2]:
            known, near = (beginning(text) for text in (f"{probe['question']} {probe['answer']}", probe["near"]))
            out.print(plain(f"{known}, near to: {near}"), soft_wrap=True)


def print_cleaned(out: Console, path: Path, cleaned: Cleaned) -> None:
    """What `data check --fix` did."""
    done = ", ".join(f"{getattr(cleaned, what):,} {what}" for what in ("written", "mended", "repeated", "unusable"))
    out.print(f"\n[bold]{plain(str(path))}[/]: {done}", soft_wrap=True)
    _print_findings(out, f"mended: {cleaned.mended:,}", [vars(each) for each in cleaned.first], cleaned.mended)


def _figures(figures: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in figures.items():
        table.add_row(f"[bold]{name}[/]", plain(value))
    return table


def _print_findings(out: Console, title: str, findings: Sequence[dict[str, str]], n: int) -> None:
    if findings:
        out.print(f"\n[bold]{title}[/]")
    for finding in findings[:SHOWN]:
        out.print(plain(f"{finding['where']}: {finding['what']}"), soft_wrap=True)
    if n > SHOWN:
        out.print(f"[dim]and {n - SHOWN:,} more[/]")
