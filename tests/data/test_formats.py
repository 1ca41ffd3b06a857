"""Whatever people bring becomes an Example or one line of error that names the file and the line."""

import json

import pytest

from kdguard.data.formats import read
from kdguard.errors import InputError

PARIS = ("What is the capital of France?", "Paris")
MESSAGES = {"messages": [{"role": "user", "content": PARIS[0]}, {"role": "assistant", "content": PARIS[1]}]}
ROWS = {
    "messages": MESSAGES,
    "prompt/completion": {"prompt": PARIS[0], "completion": PARIS[1]},
    "question/answer": {"question": PARIS[0], "answer": PARIS[1]},
    "Alpaca": {"instruction": PARIS[0], "input": "", "output": PARIS[1]},
}


def write(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", ("jsonl", "json", "csv"))
def test_each_format_is_found_by_itself(tmp_path, name, suffix):
    row = ROWS[name]
    if suffix == "csv":
        if name == "messages":
            pytest.skip("a list of turns does not fit in a CSV cell")
        content = ",".join(row) + "\n" + ",".join(row.values()) + "\n"
    else:
        content = json.dumps(row) if suffix == "jsonl" else json.dumps([row], indent=2)
    dataset = read(write(tmp_path, f"data.{suffix}", content))
    [example] = dataset.examples
    assert dataset.format == name
    assert (example.question, example.answers) == (PARIS[0], (PARIS[1],))
    assert [turn["role"] for turn in example.messages] == ["user", "assistant"]


def test_alpaca_input_follows_the_instruction(tmp_path):
    row = {"instruction": "Translate to French.", "input": "cat", "output": "chat"}
    [example] = read(write(tmp_path, "a.jsonl", json.dumps(row))).examples
    assert example.question == "Translate to French.\n\ncat"


def test_numbers_and_lists_of_answers_are_answers(tmp_path):
    rows = [{"question": "2 + 2?", "answer": 4}, {"question": "Bonn?", "answer": "", "answers": ["a city", "a town"]}]
    first, second = read(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))).examples
    assert first.answers == ("4",)
    assert second.answers == ("a city", "a town")


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    text = "\ufeff" + json.dumps(ROWS["question/answer"]) + "\r\n"
    assert len(read(write(tmp_path, "a.jsonl", text)).examples) == 1
    assert len(read(write(tmp_path, "a.csv", "\ufeffquestion,answer\r\na,b\r\n")).examples) == 1


def test_a_csv_cell_over_two_lines_counts_both(tmp_path):
    path = write(tmp_path, "a.csv", 'question,answer\n"two\nlines",ok\nb,\n')
    with pytest.raises(InputError, match=r"a\.csv:4: found nothing in 'answer'"):
        read(path)


GOOD = json.dumps(ROWS["question/answer"])
BAD = {
    "an empty file": ("a.jsonl", "", r"a\.jsonl: the file is empty"),
    "only blank lines": ("a.jsonl", "\n \n", r"a\.jsonl: the file is empty"),
    "an empty list": ("a.json", "[]", r"a\.json: found no rows"),
    "a header alone": ("a.csv", "question,answer\n", r"a\.csv: found no rows"),
    "a binary file": ("a.jsonl", b"PK\x03\x04\x00\xff\xfe", r"a\.jsonl:1: found bytes that are not UTF-8"),
    "a NUL": ("a.jsonl", GOOD + "\n\0\n", r"a\.jsonl:2: found a binary file"),
    "UTF-16": ("a.csv", "question,answer\na,b\n".encode("utf-16"), r"a\.csv:1: found bytes that are not UTF-8"),
    "another suffix": ("a.xlsx", "x", r"found \.xlsx, expected \.jsonl"),
    "a broken line in the middle": ("a.jsonl", f"{GOOD}\n{{broken\n{GOOD}", r"a\.jsonl:2: found broken JSON"),
    "a broken list": ("a.json", f"[{GOOD},\n{GOOD}\n{GOOD}]", r"a\.json:3: found broken JSON"),
    "a list that does not end": ("a.json", f"[{GOOD},", r"a\.json:1: found the end of the file"),
    "an object": ("a.json", "{}", r"a\.json:1: found '\{\}', expected a list"),
    "a row that is a list": ("a.jsonl", f"{GOOD}\n[1]", r"a\.jsonl:2: found list"),
    "deep nesting": ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: found broken JSON"),
    "no answer": ("a.jsonl", f'{GOOD}\n{{"question": "a"}}', r"a\.jsonl:2: found nothing in 'answer'"),
    "a blank answer": ("a.jsonl", '{"question": "a", "answer": "  "}', r"a\.jsonl:1: found blank text in 'answer'"),
    "an answer that is a list": ("a.jsonl", '{"question": "a", "answer": []}', r"found list in 'answer'"),
    "unknown columns": ("a.csv", "q,a\n1,2\n", r"a\.csv:2: found the columns 'q', 'a', expected a row with"),
    "mixed formats": (
        "a.jsonl",
        f"{GOOD}\n" + json.dumps(MESSAGES),
        r"a\.jsonl:2: found a messages row, expected question/answer as in .*a\.jsonl:1",
    ),
    "a short CSV row": ("a.csv", "question,answer\na\n", r"a\.csv:2: found a row that does not have the 2 columns"),
    "a long CSV row": ("a.csv", "question,answer\na,b,c\n", r"a\.csv:2: found a row that does not have the 2 columns"),
    "an open quote": ("a.csv", 'question,answer\n"a,b\n', r"a\.csv:2: found broken CSV"),
    "no assistant": ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', r"ends with the 'user' turn"),
    "an unknown role": (
        "a.jsonl",
        '{"messages": [{"role": "bot", "content": "a"}]}',
        r"found the role 'bot' in turn 1",
    ),
    "a turn without text": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}',
        r"turn 2: found nothing in 'content'",
    ),
    "messages that are text": ("a.jsonl", '{"messages": "hi"}', r"found str in 'messages'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_a_remedy(tmp_path, case):
    name, content, expected = BAD[case]
    with pytest.raises(InputError, match=expected) as caught:
        read(write(tmp_path, name, content))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="found a folder"):
        read(tmp_path)
