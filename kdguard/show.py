"""The story of `kdguard data show`: rows as the model sees them, from data that are read no further than needed."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from kdguard.config import TuneConfig
from kdguard.data.check import lengths
from kdguard.data.formats import read_examples
from kdguard.data.tokens import TARGET, TEMPLATE, TEXT, Renderer
from kdguard.data.view import SIGNS, Token, runs, tokens, visible
from kdguard.errors import InputError
from kdguard.files import write_whole
from kdguard.model.load import load_tokenizer
from kdguard.report.render import render

STYLES = {TARGET: "green", TEXT: "", TEMPLATE: "dim"}
_ASCII = str.maketrans(dict(zip(SIGNS.values(), ("\\n", "\\t", "\\s"), strict=True)))


@dataclass(frozen=True)
class Shown:
    """A row, counted from 1, or the error in its place. cut: tokens of its prompt that were left out."""

    number: int
    where: str
    tokens: list[Token]
    targets: int = 0
    cut: int = 0
    error: InputError | None = None

    def figures(self) -> dict[str, Any]:
        """The same for JSON."""
        if self.error:
            return {"row": self.number, "where": self.where, "error": self.error.message, "hint": self.error.hint}
        counts = {"length": len(self.tokens), "targets": self.targets, "cut": self.cut}
        each = [{"id": token.id, "text": token.text, "kind": token.kind} for token in self.tokens]
        return {"row": self.number, "where": self.where, **counts, "tokens": each}

    def in_words(self) -> str:
        cut = f", {self.cut:,} tokens of the prompt cut" if self.cut else ""
        return f"{len(self.tokens):,} tokens, {self.targets:,} of them targets{cut}"


def show(config: TuneConfig, first: int, chosen: Collection[int] = ()) -> tuple[list[Shown], str]:
    """The chosen rows, or else the first so many; and in words how long rows are, if those are all.

    Raises InputError for a model or data that cannot be read at all, and for a chosen row that is not there.
    """
    renderer = Renderer(load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code))
    wanted = chosen or range(1, first + 1)
    shown: list[Shown] = []
    number = 0
    try:
        for found in read_examples(config.data, config.columns):
            if number >= max(wanted):
                return shown, ""
            if isinstance(found, InputError):
                rows = [found]
            elif found[1].messages and number + 1 not in wanted:
                rows = [None]  # is not asked for
            else:
                rows = [row for _, row in renderer.rows([found[1]], config.max_length, last_turn=config.last_turn)]
            for row in rows:
                number += 1
                if number not in wanted:
                    continue
                if isinstance(row, InputError):
                    shown.append(_broken(number, row))
                else:
                    shown.append(Shown(number, found[1].where, tokens(renderer, row), row.targets, row.cut))
    except InputError as error:  # nothing after it can be read
        if not shown:
            raise
        return [*shown, _broken(number + 1, error)], ""
    if missing := [row for row in chosen if row > number]:
        raise InputError(f"--row {missing[0]}: found {number:,} rows", f"--row {number}, or less")
    if len(shown) < number:
        return shown, ""
    each = lengths(np.array([len(row.tokens) for row in shown if not row.error]))
    return shown, ", ".join(f"{name} {n:,}" for name, n in each.items())


def print_rows(out: Console, rows: Sequence[Shown], spread: str) -> None:
    """The rows under their places: as one flow in colours, or, without colours, each run beside what it is.

    Nothing that people wrote styles or steers the terminal.
    """
    plain = out.no_color or out.color_system is None
    signs = {} if out.encoding.startswith("utf") else _ASCII
    legend = Text()
    if not plain:
        for kind, what in ((TARGET, " is learned, "), (TEXT, " is read, "), (TEMPLATE, " is put around them\n")):
            legend.append(kind, STYLES[kind]).append(what)
        legend.append("every ").append("other", "underline").append(" token is underlined; ")
    shown = " ".join(SIGNS.values()).translate(signs)
    out.print(legend.append(f"{shown} are line breaks, tabs, spaces at an edge"))
    for row in rows:
        head = f"\n[bold]row {row.number:,}[/]  {escape(visible(row.where))}"
        if row.error:
            said, hint = (escape(visible(text)) for text in (row.error.message, row.error.hint))
            out.print(f"{head}\n[bold red]error[/] {said}\n  [bold]try[/] {hint}", soft_wrap=True)
            continue
        out.print(f"{head}  {row.in_words()}", soft_wrap=True)
        flow = Text()
        styles = itertools.cycle(("", " underline"))
        for kind, pieces in runs(row.tokens):
            if plain:
                each = (text.translate(signs) if sign else text for piece in pieces for text, sign in piece.fragments)
                words = "".join(each).replace("\n", f"\n{'':10}")  # so that no words stand where the kinds do
                out.print(f"{kind:10}{words}", markup=False, soft_wrap=True)
                continue
            for piece in pieces:
                style = STYLES[kind] + next(styles)
                for text, sign in piece.fragments:
                    flow.append(text.translate(signs) if sign else text, f"{style} dim" if sign else style)
        if not plain:
            out.print(flow, crop=False)  # Rich takes parts of an emoji, styled apart, for wider than they are
    if spread:
        out.print(f"\ntokens      {spread}")


def write_page(path: Path, rows: Sequence[Shown], spread: str, config: TuneConfig) -> None:
    """The rows as a page, written whole or not at all."""
    shown = [(row, list(runs(row.tokens))) for row in rows]
    data = ", ".join(config.data)
    write_whole(path, render("rows.html", rows=shown, spread=spread, data=data, model=config.model))


def _broken(number: int, error: InputError) -> Shown:
    return Shown(number, error.message.partition(": ")[0], [], error=error)
