"""Whatever people bring becomes Examples, or one line of error that names the file and the line, and a remedy."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kdguard.data import sources
from kdguard.data.formats import COLUMNS, Dataset, Example, parse_columns, read, read_examples
from kdguard.data.sources import Hub, find_sources, read_rows, read_sources, read_text
from kdguard.errors import InputError

HERE = Path(__file__).parent
FILES = HERE / "files"
TABLE = yaml.safe_load((HERE / "files.yaml").read_text(encoding="utf-8"))
ROW = {"question": "What is the capital of France?", "answer": "Paris"}
LINE = json.dumps(ROW) + "\n"


def data_of(entry: dict) -> list[str]:
    return entry["data"] if isinstance(entry["data"], list) else [entry["data"]]


def read_entry(entry: dict) -> Dataset:
    return read(
        [FILES / name for name in data_of(entry)], parse_columns(entry["columns"]) if "columns" in entry else None
    )


def example_of(expected: dict) -> Example:
    messages = [{"role": role, "content": said} for turn in expected.get("turns", ()) for role, said in turn.items()]
    answers = expected.get("answers", [turn["content"] for turn in messages[-1:]])
    muted = tuple(expected.get("muted", ()))
    return Example(tuple(messages), tuple(answers), expected["at"], muted, expected.get("text", ""))


def without_folder(text: str) -> str:
    return text.replace(f"{FILES}/", "")


def is_one_line(error: InputError) -> bool:
    return all(len(text.splitlines()) == 1 for text in (error.message, error.hint))


def names(entries: list[dict]) -> list[str]:
    return [" ".join([*data_of(entry), entry.get("columns", "")]).strip() for entry in entries]


GOOD, BAD = [[entry for entry in TABLE if key in entry] for key in ("examples", "error")]


@pytest.mark.parametrize("entry", GOOD, ids=names(GOOD))
def test_a_good_file_becomes_these_examples(entry):
    """Each turn, answer and place in the file: all that is trained, scored and pointed at is made from them."""
    dataset = read_entry(entry)
    assert dataset.formats == entry["formats"]
    found = [replace(row, where=without_folder(row.where)) for row in dataset.examples]
    assert found == [example_of(row) for row in entry["examples"]]


@pytest.mark.parametrize("entry", BAD, ids=names(BAD))
def test_a_bad_file_is_this_line_of_error(entry):
    """A person mends a file by the line alone, so the whole line is what must not change by accident."""
    with pytest.raises(InputError) as caught:
        read_entry(entry)
    message = without_folder(caught.value.message)
    if "(...)" in entry["error"]:
        message = re.sub(r"\(.*\)", "(...)", message)
    assert (message, caught.value.hint) == (entry["error"], entry["hint"])
    assert is_one_line(caught.value)
    assert caught.value.exit_code == 2


def test_the_table_and_the_folder_are_the_same():
    """A file without an entry is not tested; an entry without a file tests only that there is none."""
    listed = {FILES / name for entry in TABLE for name in data_of(entry)}
    inside = {file for file in FILES.rglob("*") if file.is_file()}
    assert {file for file in inside if listed.isdisjoint([file, *file.parents])} == set()
    assert {path.name for path in listed if not path.exists()} == {"none", "none.jsonl"}
    assert len(set(names(TABLE))) == len(TABLE)


@pytest.mark.parametrize("name", ("", "no such file", "x" * 5000, "a\0b", "a/b/c", "examples/none"))
def test_a_name_of_nothing_is_one_line(name):
    """Whatever is typed in place of a file, also what no file could be called."""
    with pytest.raises(InputError, match="no such file") as caught:
        read([name])
    assert is_one_line(caught.value)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    """A folder in place of a file fails as a file without permission does, also for root."""
    for reader in (read_text, lambda path: list(read_rows(path))):
        with pytest.raises(InputError, match="cannot be opened") as caught:
            reader(tmp_path)
        assert is_one_line(caught.value)


def test_text_that_is_not_utf8_names_its_line(tmp_path):
    path = tmp_path / "a.txt"
    for content, expected in ((b"a\nK\xf6ln", r"a\.txt:2: found bytes"), (b"\xff\xfea\0b", "broken UTF-16")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=expected):
            read_text(path)


@pytest.mark.parametrize(
    "text", ("question", "question=", "=Q", ",", "question=Q,", "nothing=Q", "question=Q;answer=A,x")
)
def test_columns_that_are_typed_wrongly_say_what_was_expected(text):
    with pytest.raises(ValueError, match=f"expected (question=Q,answer=A|one of {', '.join(COLUMNS)})"):
        parse_columns(text)


def test_a_broken_row_does_not_hide_the_others(tmp_path):
    """`data check` tells of all that is wrong at once, so reading goes on behind a row that cannot be used."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'%b{broken\n{"question": "K\xf6ln?"}\n%b{"question": "a"}\n[]\n' % ((LINE.encode(),) * 2))
    found = [row.message.split(":")[1] if isinstance(row, InputError) else row[0] for row in read_examples([path])]
    assert found == ["question/answer", "2", "3", "question/answer", "5", "6"]
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer\na\nb,c\nd,K\xf6ln\ne,f\n")
    found = [row.message.split(":")[1] if isinstance(row, InputError) else row[0] for row in read_examples([path])]
    assert found == ["2", "question/answer", "4", "question/answer"]


@pytest.mark.parametrize("piece", (1, 2, 3, 7, 50))
def test_a_number_goes_on_in_the_next_piece(tmp_path, monkeypatch, piece):
    """Half a number is a number too, unlike half of anything else."""
    path = tmp_path / "a.json"
    path.write_text("[12345, 67890]")
    monkeypatch.setattr(sources, "_CHUNK", piece)
    assert [row for _, row in read_rows(path)] == [12345, 67890]


@pytest.mark.parametrize("piece", (1, 2, 3, 7, 50, sources._CHUNK))
def test_a_list_is_read_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, piece):
    """A long list is not read at once. Where a piece ends must not matter, neither for a row nor for its line."""
    rows = [{"question": f'Wie groß\\ ist {i}? \U0001f34e ["{{', "answer": -i / 7, "more": [{}, []]} for i in range(9)]
    path = tmp_path / "a.json"
    path.write_text(
        "\n [" + ",\n\n".join(json.dumps(row, indent=1, ensure_ascii=i % 2) for i, row in enumerate(rows)) + "\n]\n "
    )
    whole = list(read_rows(path))
    monkeypatch.setattr(sources, "_CHUNK", piece)
    assert list(read_rows(path)) == whole
    assert [row for _, row in whole] == rows
    tall = len(json.dumps(rows[0], indent=1).splitlines()) + 1
    assert [where for where, _ in whole] == [f"{path}:{2 + i * tall}" for i in range(len(rows))]


def test_a_list_longer_than_a_piece_keeps_its_lines(tmp_path):
    """In the real size: rows across the edges, and a broken row behind them that is still found in its line."""
    count = 2 * sources._CHUNK // len(LINE)
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join([LINE[:-1]] * count) + ",\n{broken}]")
    found = []
    with pytest.raises(InputError, match=rf"a\.json:{count + 2}: found broken JSON"):
        for where, _ in read_rows(path):
            found.append(where)
    assert found == [f"{path}:{line}" for line in range(2, count + 2)]


@pytest.mark.parametrize("suffix", ("jsonl", "json", "csv"))
def test_progress_counts_bytes_up_to_all(tmp_path, suffix):
    """A bar over several files never goes back, never over the end, and ends full."""
    rows = 3 * sources._OFTEN
    lines = {"jsonl": LINE * rows, "json": json.dumps([ROW] * rows), "csv": "question,answer\n" + "a,b\n" * rows}
    for name in ("a", "b"):
        (tmp_path / f"{name}.{suffix}").write_text(lines[suffix])
    told: list[tuple[int, int]] = []
    assert len(list(read_examples([tmp_path], progress=lambda *at: told.append(at)))) == 2 * rows
    total = 2 * len(lines[suffix])
    assert len(told) > 4
    assert told == sorted(told)
    assert {each for _, each in told} == {total}
    assert told[-1] == (total, total)


def test_rows_of_the_hub_are_read_as_those_of_a_file(tmp_path):
    """A dataset of the hub is told from a file by its name. A folder stands in for it: the library is the real one."""
    assert find_sources(["somebody/some-data"]) == [Hub("somebody/some-data")]
    (tmp_path / "train.jsonl").write_text(LINE * 2)
    assert list(read_sources([Hub(str(tmp_path))])) == [(f"{tmp_path}:1", ROW), (f"{tmp_path}:2", ROW)]


def test_a_dataset_of_the_hub_without_rows_to_train_on_is_one_line(tmp_path):
    (tmp_path / "test.jsonl").write_text(LINE)
    with pytest.raises(InputError, match="train") as caught:
        list(read_sources([Hub(str(tmp_path))]))
    assert is_one_line(caught.value)


def test_the_hub_without_a_network_or_its_library_is_one_line(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="somebody/some-data: no such file, and no dataset of the hub") as caught:
        read(["somebody/some-data"])
    assert is_one_line(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InputError, match="the `datasets` library is missing") as caught:
        read(["somebody/some-data"])
    assert caught.value.hint == "pip install datasets"
