"""`data check --fix`: the rows that can be used, once each and with their encoding mended, as JSON lines. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdguard.data.check import UNUSABLE, Checked, Progress, check
from kdguard.data.formats import Example, read_examples
from kdguard.data.sources import WINDOWS
from kdguard.data.trouble import mended
from kdguard.errors import InputError
from kdguard.files import write_jsonl


def refuse_out(out: Path) -> None:
    """Raise InputError for a place where the cleaned rows cannot go."""
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise InputError(f"{out}: the cleaned rows are written as JSON lines", f"--fix {out.with_suffix('.jsonl')}")
    if out.exists():
        raise InputError(f"{out}: this file is already there", "give another name after --fix")


def clean(
    names: Sequence[str],
    out: Path,
    checked: Checked,
    columns: Mapping[str, str] | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, int]:
    """Write the cleaned rows to `out`, whole or not at all, and return how many were written, mended and left out.

    Questions with their answers stay that, and plain text too; all else becomes `messages`. Bytes that are no UTF-8
    are read as Windows-1252. What only a person can decide is left as it is: near repeats, contradictions, secrets.
    Raises InputError for rows that one file cannot hold, and where nothing after a row can be read.
    """
    refuse_out(out)
    if checked.counts[UNUSABLE]:
        checked = check(names, columns, progress, errors=WINDOWS)
    if checked.ended:
        raise checked.ended
    if checked.unusable and not checked.rows:
        raise checked.unusable
    if "text" in checked.formats and len(checked.formats) > 1:
        raise InputError(
            f"{', '.join(names)}: found {' and '.join(checked.formats)}, which one file cannot hold",
            "clean the files one by one",
        )
    form = checked.formats[0] if len(checked.formats) == 1 else ""
    did = {"written": 0, "mended": 0, "repeated": len(checked.repeats), "unusable": checked.counts[UNUSABLE]}

    def rows() -> Iterator[dict[str, Any]]:
        found = read_examples(names, columns, progress, errors=WINDOWS)
        for place, (_, example) in enumerate(each for each in found if not isinstance(each, InputError)):
            if place not in checked.repeats:
                better = _mended(example)
                did["written"] += 1
                did["mended"] += better != example
                yield _row(better, form)

    write_jsonl(out, rows())
    return did


def _mended(example: Example) -> Example:
    messages = tuple({**turn, "content": mended(turn["content"])} for turn in example.messages)
    return replace(example, messages=messages, answers=tuple(map(mended, example.answers)), text=mended(example.text))


def _row(example: Example, form: str) -> dict[str, Any]:
    if form == "text":
        return {"text": example.text}
    if form == "question/answer":
        answers = {"answers": list(example.answers)} if len(example.answers) > 1 else {"answer": example.answers[0]}
        return {"question": example.question, **answers}
    return {
        "messages": [
            {**turn, "weight": 0} if place in example.muted else turn for place, turn in enumerate(example.messages)
        ]
    }
