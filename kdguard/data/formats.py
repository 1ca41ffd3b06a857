"""Any row of a person's file -> Example. Every error names `file:line`, what was found and what was expected."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdguard.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv")
EXPECTED = (
    'a row with {"messages": [...]}, {"prompt": ..., "completion": ...}, {"question": ..., "answer": ...} '
    'or {"instruction": ..., "input": ..., "output": ...}'
)
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the assistant's turn, and where it stands: `file:line`.

    `answers` are the accepted forms of the last turn, the one that is taught first.
    """

    messages: tuple[dict[str, str], ...]
    answers: tuple[str, ...]
    where: str

    @property
    def question(self) -> str:
        """What a person sees as the question: the last user turn."""
        return next(turn["content"] for turn in reversed(self.messages) if turn["role"] == "user")


@dataclass(frozen=True)
class Dataset:
    """The examples of one file and the format that was found."""

    path: Path
    format: str
    examples: list[Example]


def read(path: Path) -> Dataset:
    """Read a JSONL, JSON or CSV file of one format, found from its first row. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path}: found a folder, expected a file", "name one .jsonl, .json or .csv file in it")
    if not path.is_file():
        raise InputError(f"{path}: no such file", "kdguard tune DATA, where DATA is a .jsonl, .json or .csv file")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path}: found {path.suffix or 'no suffix'}, expected {', '.join(SUFFIXES)}",
            "rename it, or save it as one JSON object a line in a .jsonl file",
        )
    examples: list[Example] = []
    first_format = ""
    for where, row in read_rows(path):
        found = _format_of(row)
        if not found:
            keys = f"the columns {', '.join(map(repr, row))}" if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{where}: found {keys}, expected {EXPECTED}", "rename the columns to one of these")
        first_format = first_format or found
        if found != first_format:
            raise InputError(
                f"{where}: found a {found} row, expected {first_format} as in {examples[0].where}",
                "keep one format in a file",
            )
        examples.append(_READERS[found](row, where))
    if not examples:
        raise InputError(f"{path}: found no rows, expected {EXPECTED}", "add at least one row")
    return Dataset(path, first_format, examples)


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(`file:line`, row) for every row of a JSONL, JSON or CSV file. Raises InputError."""
    text = read_text(path)
    rows = {".csv": _csv_rows, ".json": _json_rows}.get(path.suffix.lower(), _jsonl_rows)
    for line, row in rows(path, text):
        yield f"{path}:{line}", row


def read_text(path: Path) -> str:
    """The file as UTF-8 text without its byte order mark. Raises InputError for anything else."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: found bytes that are not UTF-8 text",
            "save the file as UTF-8 text (not a spreadsheet or archive)",
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}:{line}: found a binary file", "save the rows as UTF-8 text, one JSON object a line")
    if not text.strip():
        raise InputError(f"{path}: the file is empty", f"expected {EXPECTED}")
    return text


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise InputError(
                    f"{path}:{number}: found broken JSON{column}: {line.strip()[:60]!r}, expected one object a line",
                    "mend or delete that line",
                ) from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()

    def fail(at: int, found: str) -> InputError:
        line = text.count("\n", 0, at) + 1
        return InputError(f"{path}:{line}: found {found}, expected a list of rows", "[{...}, {...}]")

    def skip(at: int) -> int:
        while at < len(text) and text[at].isspace():
            at += 1
        return at

    at = skip(0)
    if text[at] != "[":
        raise fail(at, repr(text[at : at + 20]))
    line, counted = 1, 0
    at = skip(at + 1)
    while at < len(text) and text[at] != "]":
        try:
            row, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise fail(getattr(error, "pos", at), "broken JSON") from None
        line, counted = line + text.count("\n", counted, at), at
        yield line, row
        at = skip(end)
        if at < len(text) and text[at] == ",":
            at = skip(at + 1)
        elif at < len(text) and text[at] != "]":
            raise fail(at, "broken JSON")
    if at >= len(text):
        raise fail(len(text) - 1, "the end of the file inside the list")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}:{line}: found a row that does not have the "
                    f"{len(reader.fieldnames or ())} columns of the header",
                    'put "quotes" around values with commas in them',
                )
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: found broken CSV ({error})", 'put "quotes" around values') from None


def _format_of(row: Any) -> str:
    if not isinstance(row, dict):
        return ""
    for name, needed in _COLUMNS.items():
        if all(key in row for key in needed):
            return name
    if "question" in row:
        return "question/answer"  # the reader says what is missing
    return ""


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value in (None, "") else "blank text" if isinstance(value, str) else type(value).__name__
        raise InputError(f"{where}: found {found} in {key!r}, expected text", "fill it in or delete the row")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{where}: found half of a character in {key!r} (a lone surrogate)", "write that text again")
    return value


def _pair(question: str, answer: str, where: str, also: tuple[str, ...] = ()) -> Example:
    return Example(
        ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), (answer, *also), where
    )


def _read_messages(row: dict[str, Any], where: str) -> Example:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: found {type(turns).__name__} in 'messages', expected a list of turns", EXPECTED)
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            found = turn.get("role") if isinstance(turn, dict) else turn
            raise InputError(
                f"{where}: found the role {found!r} in turn {number}, expected one of {', '.join(_ROLES)}",
                '{"role": "user", "content": "..."}',
            )
        messages.append({"role": turn["role"], "content": _text(turn, "content", f"{where}: turn {number}")})
    if messages[-1]["role"] != "assistant" or "user" not in {turn["role"] for turn in messages}:
        raise InputError(
            f"{where}: found a conversation that ends with the {messages[-1]['role']!r} turn, "
            "expected a user's turn answered by the assistant's",
            "add the assistant's answer or delete the row",
        )
    return Example(tuple(messages), (messages[-1]["content"],), where)


def _read_prompt_completion(row: dict[str, Any], where: str) -> Example:
    return _pair(_text(row, "prompt", where), _text(row, "completion", where), where)


def _read_question_answer(row: dict[str, Any], where: str) -> Example:
    question = _text(row, "question", where)
    if isinstance(row.get("answers"), list) and row["answers"]:
        answers = [_text({"answers": answer}, "answers", where) for answer in row["answers"]]
        return _pair(question, answers[0], where, tuple(answers[1:]))
    return _pair(question, _text(row, "answer", where), where)


def _read_alpaca(row: dict[str, Any], where: str) -> Example:
    instruction = _text(row, "instruction", where)
    if row.get("input"):
        instruction += "\n\n" + _text(row, "input", where)
    return _pair(instruction, _text(row, "output", where), where)


_COLUMNS = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "question/answer": ("question", "answer"),
    "Alpaca": ("instruction", "output"),
}
_READERS = {
    "messages": _read_messages,
    "prompt/completion": _read_prompt_completion,
    "question/answer": _read_question_answer,
    "Alpaca": _read_alpaca,
}
