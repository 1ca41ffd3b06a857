"""`data check --fix`: the rows that can be used, once each and with their encoding mended, as JSON lines. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdguard.data.check import KEPT, UNUSABLE, Checked, Finding, Progress, check, exactly
from kdguard.data.formats import Example, read_examples
from kdguard.data.sources import WINDOWS
from kdguard.data.trouble import mended
from kdguard.errors import InputError
from kdguard.files import write_jsonl


def refuse_out(out: Path) -> None:
    """Raise InputError for a place where the cleaned rows cannot go."""
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise InputError(f"{out}: the cleaned rows are written as JSON lines", f"--fix {out.stem or 'cleaned'}.jsonl")
    if out.exists():
        raise InputError(f"{out}: this file is already there", "give another name after --fix")


@dataclass
class Cleaned:
    """Rows written, rows left out because they repeat an earlier one or cannot be used, and those whose words changed.

    Of the rows that were mended `first` holds the first KEPT, each with a piece of it before and after.
    """

    written: int = 0
    repeated: int = 0
    unusable: int = 0
    mended: int = 0
    first: list[Finding] = field(default_factory=list)


def clean(
    names: Sequence[str],
    out: Path,
    checked: Checked,
    columns: Mapping[str, str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Cleaned:
    """Write the cleaned rows to `out`, whole or not at all, and tell what was done.

    Questions with their answers stay that, and plain text too; all else becomes `messages`. Columns that are not taught
    are left out. Bytes that are no UTF-8 are read as Windows-1252. What only a person can decide is left as it is: near
    repeats, contradictions, secrets. Raises InputError for files of several formats, and where nothing after a row can
    be read.
    """
    refuse_out(out)
    if checked.counts[UNUSABLE]:
        checked = check(names, columns, progress, errors=WINDOWS)
    if checked.ended:
        raise checked.ended
    if checked.unusable and not checked.rows:
        raise checked.unusable
    if len(checked.formats) > 1:
        raise InputError(
            f"{', '.join(names)}: found {' and '.join(checked.formats)}, which one file cannot hold",
            "clean the files one by one",
        )
    did = Cleaned()
    seen: set[int] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for found in read_examples(names, columns, progress, errors=WINDOWS):
            if isinstance(found, InputError):
                did.unusable += 1
                continue
            example = _mended(found[1])
            words = _words(example)
            key = hash(exactly(example))
            if not all(text.strip() for text in words):
                did.unusable += 1  # there was nothing but control characters
            elif key in seen:
                did.repeated += 1
            else:
                seen.add(key)
                did.written += 1
                if example != found[1]:
                    did.mended += 1
                    if did.mended <= KEPT:
                        did.first.append(_change(example.where, _words(found[1]), words))
                yield _row(example, found[0])

    write_jsonl(out, rows())
    return did


def _words(example: Example) -> list[str]:
    return [*(turn["content"] for turn in example.messages), *example.answers] if example.messages else [example.text]


def _change(where: str, before: Sequence[str], after: Sequence[str]) -> Finding:
    old, new = next(pair for pair in zip(before, after, strict=True) if pair[0] != pair[1])
    at = max(0, next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new)) - 20)
    return Finding(where, f"{old[at : at + 50]!r} is now {new[at : at + 50]!r}")


def _mended(example: Example) -> Example:
    messages = tuple({**turn, "content": mended(turn["content"])} for turn in example.messages)
    return replace(example, messages=messages, answers=tuple(map(mended, example.answers)), text=mended(example.text))


def _row(example: Example, form: str) -> dict[str, Any]:
    if form == "text":
        return {"text": example.text}
    if form == "question/answer":
        answers = {"answers": list(example.answers)} if len(example.answers) > 1 else {"answer": example.answers[0]}
        system = {turn["role"]: turn["content"] for turn in example.messages if turn["role"] == "system"}
        return {**system, "question": example.question, **answers}
    return {
        "messages": [
            {**turn, "weight": 0} if place in example.muted else turn for place, turn in enumerate(example.messages)
        ]
    }
