"""Any row that people have -> Example. Every error names `file:line`, what was found and what was expected."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from kdguard.data.sources import STRICT, find_sources, read_sources
from kdguard.errors import InputError

EXPECTED = (
    'a row with {"messages": [...]}, {"conversations": [...]}, {"prompt", "completion"}, {"question", "answer"}, '
    '{"instruction", "input", "output"}, {"instruction", "response"} or {"text"}'
)
_OPENAI = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT = {**_OPENAI, "human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant"}
_PLAIN = re.compile(r"(?!.{100})[\w.-]+(?: [\w.-]+)*")  # a column's name that a person can type after --columns
_TURNS = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
_TOOLS = ("tool", "function", "function_call", "observation", "ipython")


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with the assistant's turn, or a plain text; and where it stands: `file:line`.

    `answers` are the accepted forms of the last turn, the one that is taught first. `muted` are the assistant's turns
    that are not taught, by their place. A plain text has no turns and no answers, and is taught as it is.
    """

    messages: tuple[dict[str, str], ...]
    answers: tuple[str, ...]
    where: str
    muted: tuple[int, ...] = ()
    text: str = ""

    @property
    def question(self) -> str:
        """What a person sees as the question: the last user turn; of a plain text, nothing."""
        return next((turn["content"] for turn in reversed(self.messages) if turn["role"] == "user"), "")


@dataclass(frozen=True)
class Dataset:
    """All examples, and the formats that were found."""

    formats: list[str]
    examples: list[Example]


def read(names: Sequence[str | Path], columns: Mapping[str, str] | None = None) -> Dataset:
    """Read files, folders or hub datasets as a whole. Raises InputError for the first row that cannot be used."""
    formats: dict[str, None] = {}
    examples: list[Example] = []
    for found in read_examples(names, columns):
        if isinstance(found, InputError):
            raise found
        formats[found[0]] = None
        examples.append(found[1])
    return Dataset(list(formats), examples)


def read_examples(
    names: Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    errors: str = STRICT,
) -> Iterator[tuple[str, Example] | InputError]:
    """The format and the example of each row, one at a time; an InputError in place of a row that cannot be used.

    A file is of one format, found from its first row. columns: the file's name for a column of a format, such as
    {"question": "Q"}. progress, errors: as in `read_sources`. Raises InputError where nothing after it can be read.
    """
    first: dict[str, tuple[str, str]] = {}  # file -> its format, and the row that told
    for where, row in read_sources(find_sources([str(name) for name in names]), progress, errors):
        if isinstance(row, InputError):
            yield row
            continue
        try:
            if columns:
                row = _renamed(row, columns, where)
            found = _format_of(row)
            if not found:
                raise _unknown(row, where)
            file = where.rpartition(":")[0]
            expected, told = first.setdefault(file, (found, where))
            if ("tools" in row or "functions" in row) and (_uses(row, "tools") or _uses(row, "functions")):
                raise _uses_tools(where, "tools")
            if found != expected:
                raise InputError(
                    f"{where}: found a row of {found}, expected {expected} as in {told}", "keep one format in a file"
                )
            example = _READERS[found](row, where)
            yield found, _with_system(example, row, where) if "system" in row else example
        except InputError as error:
            yield error


def parse_columns(text: str) -> dict[str, str]:
    """`question=Q,answer=A` -> {"question": "Q", "answer": "A"}. Raises ValueError that says what was expected."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    for name, equals, column in pairs:
        if not equals or not column.strip():
            raise ValueError(f"found {name!r}, expected question=Q,answer=A")
        if name.strip() not in COLUMNS:
            raise ValueError(f"found {name.strip()!r}, expected one of {', '.join(COLUMNS)}")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _renamed(row: Any, columns: Mapping[str, str], where: str) -> Any:
    """The row under a format's names. Columns of other formats go, so that what is named decides the format."""
    if not isinstance(row, dict):
        return row
    for name, column in columns.items():
        if column not in row:
            raise InputError(
                f"{where}: found {_names(row)}, expected {column!r}, which --columns names", f"--columns {name}=NAME"
            )
    kept = {key for keys in _KEYS.values() if not columns.keys().isdisjoint(keys) for key in keys}
    if "answer" in columns:
        kept.discard("answers")  # which else would come first
    dropped = {*COLUMNS} - kept | {*columns.values()}
    others = {key: value for key, value in row.items() if key not in dropped}
    return {**others, **{name: row[column] for name, column in columns.items()}}


def _names(row: Any) -> str:
    if not isinstance(row, dict):
        return _kind(row)
    return f"the columns {', '.join(map(repr, row))}"[:200] if row else "no columns"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _unknown(row: Any, where: str) -> InputError:
    hint = "rename the columns to one of these"
    if not isinstance(row, dict):
        hint = 'one object a row, such as {"question": "...", "answer": "..."}'
    else:
        if {"chosen", "rejected"} <= row.keys():
            if isinstance(row["chosen"], list) or "prompt" in row:
                name = "messages" if isinstance(row["chosen"], list) else "completion"
                hint = f"--columns {name}=chosen, to learn the chosen answers"
        elif len(texts := [key for key in row if isinstance(row[key], str) and _PLAIN.fullmatch(key)]) >= 2:
            quote = '"' if " " in texts[0] + texts[1] else ""
            hint = f"--columns {quote}question={texts[0]},answer={texts[1]}{quote}, if those are that"
        elif lists := [key for key in row if isinstance(row[key], list) and _PLAIN.fullmatch(key)]:
            hint = f"if {lists[0]!r} is the list of rows, save that list alone as the file"
    return InputError(f"{where}: found {_names(row)}, expected {EXPECTED}", hint)


def _format_of(row: Any) -> str:
    if not isinstance(row, dict):
        return ""
    empty = ""
    for name, needed in _NEEDED.items():
        if needed <= row.keys():
            if None not in [row[key] for key in needed]:
                return name
            empty = empty or name  # of several sets in one table, each leaves the others' columns empty
    if empty:
        return empty
    if "question" in row:
        return "question/answer"  # the reader says what is missing
    return ""


def _is_missing(value: Any) -> bool:
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and value != value)  # pandas writes NaN for no value


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_missing(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = "blank text" if value and isinstance(value, str) else "nothing" if _is_missing(value) else _kind(value)
        hint = "fill it in or delete the row" if _is_missing(value) else "write it as text or delete the row"
        raise InputError(f"{where}: found {found} in {key!r}, expected text", hint)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: found half of a character in {key!r} (a lone surrogate)", "write that text again"
            ) from None
    return value


def _pair(question: str, answer: str, where: str, also: tuple[str, ...] = ()) -> Example:
    return Example(
        ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), (answer, *also), where
    )


def _list_of_cell(value: Any, key: str, where: str) -> Any:
    """A cell of CSV holds a list as JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(
            f"{where}: found broken JSON in {key!r}, expected a list",
            "write the cell with Python's json.dumps, or the rows as JSONL",
        ) from None


def _conversation(turns: Any, where: str, key: str, roles: Mapping[str, str]) -> Example:
    turns = _list_of_cell(turns, key, where)
    if not isinstance(turns, (list, tuple)) or not turns:
        found = "an empty list" if turns == [] else _kind(turns)
        raise InputError(f"{where}: found {found} in {key!r}, expected a list of turns", _TURNS)
    messages, muted = [], []
    for number, turn in enumerate(turns, 1):
        said = turn if isinstance(turn, dict) else {}
        speaker = said.get("role", said.get("from"))
        role = roles.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            if speaker in _TOOLS:
                raise _uses_tools(where, f"the role {speaker!r} in turn {number}")
            if not isinstance(turn, dict):
                raise InputError(f"{where}: found {_kind(turn)} as turn {number}, expected an object", _TURNS)
            found = f"the role {speaker[:60]!r}" if isinstance(speaker, str) else f"{_kind(speaker)} as the role"
            renamed = key == "messages" and isinstance(speaker, str) and speaker in _SHAREGPT
            raise InputError(
                f"{where}: found {found} in turn {number}, expected one of {', '.join(roles)}",
                "--columns conversations=messages" if renamed else _TURNS,
            )
        if said.get("tool_calls") or said.get("function_call"):
            raise _uses_tools(where, f"a tool call in turn {number}")
        words = "content" if "content" in said or "value" not in said else "value"
        if isinstance(said.get(words), (list, tuple)):
            said = {**said, words: _joined(said[words], f"{where}: turn {number}")}
        messages.append({"role": role, "content": _text(said, words, f"{where}: turn {number}")})
        if role == "assistant" and said.get("weight") == 0:  # how OpenAI's format says that a turn is not taught
            muted.append(number - 1)
    said_by = [turn["role"] for turn in messages]
    if said_by[-1] != "assistant" or "user" not in said_by:
        found = f"that ends with the {said_by[-1]!r} turn" if "user" in said_by else "without a 'user' turn"
        raise InputError(
            f"{where}: found a conversation {found}, expected a user's turn answered by the assistant's",
            "add the turn that is missing or delete the row",
        )
    if len(muted) == said_by.count("assistant"):
        raise InputError(f"{where}: found the weight 0 on every turn, so nothing is taught", "delete the row")
    return Example(tuple(messages), (messages[-1]["content"],), where, tuple(muted))


def _uses(row: Mapping[str, Any], key: str) -> bool:
    return bool(row.get(key)) and row[key] not in ("[]", "null")


def _uses_tools(where: str, found: str) -> InputError:
    return InputError(
        f"{where}: found {found}, and tool calls are not trained yet",
        "leave out `tools` and the turns that call them, or delete the row",
    )


def _joined(parts: Sequence[Any], where: str) -> str:
    """OpenAI's content as a list of parts, if they are all text."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            found = f"a part of type {kind[:60]!r}" if isinstance(kind, str) else f"{_kind(part)} as a part"
            raise InputError(
                f"{where}: found {found}, expected parts of type 'text'",
                'keep {"type": "text", "text": "..."} alone, or delete the row',
            )
    return "".join(part["text"] for part in parts)


def _read_messages(row: dict[str, Any], where: str) -> Example:
    return _conversation(row["messages"], where, "messages", _OPENAI)


def _read_sharegpt(row: dict[str, Any], where: str) -> Example:
    return _conversation(row["conversations"], where, "conversations", _SHAREGPT)


def _with_system(example: Example, row: dict[str, Any], where: str) -> Example:
    """The same with the system turn that stands in a column of its own, if there is one."""
    if _is_missing(row.get("system")) or not example.messages:
        return example
    if example.messages[0]["role"] == "system":
        raise InputError(f"{where}: found a 'system' column and a system turn", "keep one of them")
    system = {"role": "system", "content": _text(row, "system", where)}
    return replace(example, messages=(system, *example.messages), muted=tuple(place + 1 for place in example.muted))


def _more(row: dict[str, Any], where: str) -> str:
    """What stands beside a question in a column of its own."""
    texts = [_text(row, key, where) for key in ("input", "context") if key in row and not _is_missing(row[key])]
    return "".join([f"\n\n{text}" for text in texts])


def _read_prompt_completion(row: dict[str, Any], where: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], where, "prompt", _OPENAI)
    return _pair(_text(row, "prompt", where), _text(row, "completion", where), where)


def _read_question_answer(row: dict[str, Any], where: str) -> Example:
    question = _text(row, "question", where) + _more(row, where)
    key = "answers" if row.get("answers") or ("answer" not in row and "answers" in row) else "answer"
    forms = _list_of_cell(row["answers"], key, where) if key == "answers" else row.get(key)
    if isinstance(forms, list):
        if not forms:
            raise InputError(f"{where}: found an empty list in {key!r}, expected text", "fill it in or delete the row")
        answers = [_text({key: form}, key, where) for form in forms]
        return _pair(question, answers[0], where, tuple(answers[1:]))
    return _pair(question, _text(row, key, where), where)


def _read_alpaca(row: dict[str, Any], where: str) -> Example:
    instruction = _text(row, "instruction", where)
    instruction += _more(row, where)
    example = _pair(instruction, _text(row, "output", where), where)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise InputError(f"{where}: found {_kind(history)} in 'history', expected pairs of texts", '[["...", "..."]]')
    turns = [{"content": text} for pair in history for text in pair]
    before = [
        {"role": role, "content": _text(turn, "content", f"{where}: turn {number} of 'history'")}
        for number, (turn, role) in enumerate(zip(turns, cycle(("user", "assistant")), strict=False), 1)
    ]
    return replace(example, messages=(*before, *example.messages))


def _read_instruction_response(row: dict[str, Any], where: str) -> Example:
    return _pair(_text(row, "instruction", where) + _more(row, where), _text(row, "response", where), where)


def _read_text(row: dict[str, Any], where: str) -> Example:
    return Example((), (), where, text=_text(row, "text", where))


# What tells a format, from the surest sign to the weakest: Alpaca's own file has a `text` beside the rest.
_FORMATS = {
    "OpenAI messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "question/answer": ("question", "answer"),
    "Alpaca": ("instruction", "output"),
    "instruction/response": ("instruction", "response"),
    "text": ("text",),
}
_READERS = {
    "OpenAI messages": _read_messages,
    "ShareGPT": _read_sharegpt,
    "prompt/completion": _read_prompt_completion,
    "question/answer": _read_question_answer,
    "Alpaca": _read_alpaca,
    "instruction/response": _read_instruction_response,
    "text": _read_text,
}
_NEEDED = {name: frozenset(needed) for name, needed in _FORMATS.items()}
_KEYS = {**_FORMATS, "question/answer": ("question", "answer", "answers"), "Alpaca": ("instruction", "output", "input")}
COLUMNS = tuple(dict.fromkeys(key for keys in _KEYS.values() for key in keys))
