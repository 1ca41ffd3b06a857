"""No bytes under any name and no row of any shape make anything but Examples and single lines of error.

Every run tries the same cases, so that a failure is a failure for everyone.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdguard.data.formats import COLUMNS, Example, parse_columns, read_examples
from kdguard.data.sources import SUFFIXES
from kdguard.errors import InputError

FILES = sorted(
    file
    for file in (Path(__file__).parent / "files").rglob("*")
    if file.suffix.lower() in SUFFIXES and file.stat().st_size < 5000
)
many, some = (
    settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
    )
    for count in (400, 150)
)

texts = st.text(st.characters(), max_size=8)  # lone surrogates too
words = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "text", "[", "[{}]", '["a"]', " ", "a\nb"]
)
keys = st.sampled_from([*COLUMNS, "role", "content", "from", "value", "weight", "tools", "type", "chosen", "rejected"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | texts, inner, max_size=4),
    max_leaves=12,
)
TURNS = [
    {"role": "system", "content": "Answer in one word.", "weight": 1},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
    {"role": "assistant", "content": "Paris", "tool_calls": [], "weight": 1},
]
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS, "tools": []},
    {"messages": json.dumps(TURNS)},
    {
        "conversations": [
            {"from": "human", "value": "What is the capital of France?"},
            {"from": "gpt", "value": "Paris"},
        ]
    },
    {"prompt": "What is the capital of France?", "completion": "Paris"},
    {"prompt": TURNS[:2], "completion": TURNS[2:]},
    {"prompt": "What is the capital of France?", "chosen": "Paris", "rejected": "Lyon"},
    {"question": "What is the capital of France?", "answer": "Paris", "answers": ["Paris", "Paris, France"]},
    {"instruction": "Translate to French.", "input": "cat", "output": "chat", "text": "cat: chat"},
    {"instruction": "Name a colour.", "response": "Blue"},
    {"text": "Paris is the capital of France."},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in inside] + [way for key, each in inside for way in places(each, (*path, key))]


@st.composite
def rows_near_a_format(draw: st.DrawFn) -> dict[str, Any]:
    """A good row in which one value is another, or has gone, or a key has another name."""
    row: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(ROWS)))
    *way, last = draw(st.sampled_from(places(row)))
    holder: Any = row
    for key in way:
        holder = holder[key]
    change = draw(st.sampled_from(["swap", "drop", "rename"]))
    if change == "swap" or isinstance(holder, list):
        holder[last] = draw(values)
    else:
        value = holder.pop(last)
        if change == "rename":
            holder[draw(keys | texts)] = value
    return row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_all(path: Path, content: bytes, columns: Mapping[str, str] | None = None) -> None:
    """Read it, and see that each row became something that can be trained on, or one line with a remedy."""
    path.write_bytes(content)
    try:
        for found in read_examples([path], columns):
            if isinstance(found, InputError):
                check_error(found)
            else:
                check_example(found[1])
    except InputError as error:
        check_error(error)


def check_error(error: InputError) -> None:
    for text in (error.message, error.hint):
        assert len(text.splitlines()) == 1, text
        text.encode()  # what cannot be written, cannot be printed
    if suggested := re.match(r'--columns "?([^"]+?)"?(?:, |$)', error.hint):
        parse_columns(suggested[1])  # what is said to be typed next can be typed


def check_example(example: Example) -> None:
    roles = [turn["role"] for turn in example.messages]
    said: Sequence[str] = [turn["content"] for turn in example.messages] or [example.text]
    for text in (*said, *example.answers):
        assert text.strip()
        text.encode()
    if example.messages:
        assert not example.text
        assert set(roles) <= {"system", "user", "assistant"}
        assert "user" in roles
        assert roles[-1] == "assistant"
        assert example.answers[0] == said[-1]
        assert {roles[place] for place in example.muted} <= {"assistant"}
        assert len(example.muted) < roles.count("assistant")
    else:
        assert not example.answers


@many
@given(content=st.binary(max_size=300), suffix=st.sampled_from(SUFFIXES))
def test_any_bytes_under_any_suffix(folder, content, suffix):
    """A file may be anything at all, whatever it is called."""
    check_all(folder / f"a{suffix}", content)


@many
@given(data=st.data(), file=st.sampled_from(FILES), other=st.binary(max_size=6))
def test_any_file_with_some_bytes_changed(folder, data, file, other):
    """A download breaks off, a disk fails, an editor slips: near a good file lie more kinds of bad than far from it."""
    content = file.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 8, len(content))) | st.just(len(content)))
    check_all(folder / f"b{file.suffix}", content[:start] + other + content[end:])


@some
@given(
    text=st.text(st.sampled_from("[]{}\",':;\\\t\r\n 1e-.aé\ufeff\u2028\x85\0") | st.characters(), max_size=60),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"]),
    suffix=st.sampled_from(SUFFIXES[:-1]),
)
def test_any_text_in_any_encoding(folder, text, encoding, suffix):
    """The signs of JSON and CSV in every order, as any editor may save them."""
    check_all(folder / f"c{suffix}", text.encode(encoding, errors="replace"))


@many
@given(value=values)
def test_any_json_as_a_row(folder, value):
    """JSON promises no shape. The row is alone on its line, and in a list of two."""
    row = json.dumps(value).encode()
    check_all(folder / "d.jsonl", row)
    check_all(folder / "d.json", b"[%b, %b]" % (row, row))


@many
@given(row=rows_near_a_format(), ascii_only=st.booleans())
def test_any_row_near_a_format(folder, row, ascii_only):
    """The rows that people have by mistake are those that are almost right."""
    text = json.dumps(row, ensure_ascii=ascii_only)
    check_all(folder / "e.jsonl", text.encode(errors="surrogatepass"))


@some
@given(row=rows_near_a_format() | values, data=st.data())
def test_any_row_with_any_columns(folder, row, data):
    """--columns names whatever is typed: columns that are there or not, one twice, one for itself."""
    there = st.sampled_from([*(row if isinstance(row, dict) else ()), "none"])
    columns = data.draw(st.dictionaries(st.sampled_from(COLUMNS), there, max_size=4))
    check_all(folder / "f.jsonl", json.dumps(row).encode(), columns)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row))
def test_any_depth_of_any_value(folder, row):
    """Python gives up on deep values at a depth of its own, in whichever step comes first: each must be caught."""
    for depth in (*range(960, 1000, 3), 100_000):
        deep = "[" * depth + "]" * depth
        for way in places(row):
            changed = copy.deepcopy(row)
            holder: Any = changed
            for key in way[:-1]:
                holder = holder[key]
            holder[way[-1]] = "DEEP"
            check_all(folder / "g.jsonl", json.dumps(changed).replace('"DEEP"', deep).encode())
    check_all(folder / "g.csv", f"messages\n{deep}\n".encode())
