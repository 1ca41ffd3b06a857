"""Rows read back are the rows that were made, from memory or from a file that only the same data and settings find."""

import json

import pytest

from kdguard.data import rows as data
from kdguard.data.formats import read
from kdguard.data.rows import Rows, tokenise
from kdguard.data.tokens import Renderer
from kdguard.errors import InputError
from tests.conftest import byte_tokenizer

TALK = {
    "messages": [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Bye."},
    ]
}


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(byte_tokenizer())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Every file counts as large, and its tokens are kept here."""
    monkeypatch.setattr(data, "LARGE", 1)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def facts(n: int) -> list[dict]:
    return [{"question": f"What is {i}?", "answers": [f"A number ({i}).", f"{i}"]} for i in range(n)]


def same(rows: Rows, other: Rows) -> bool:
    return list(rows) == list(other) and list(rows.examples()) == list(other.examples())


@pytest.mark.parametrize("batch", (1, 7, 1000))
def test_rows_and_their_examples_are_those_of_the_file_in_order(tmp_path, renderer, monkeypatch, batch):
    """However they are cut into batches."""
    monkeypatch.setattr(data, "_BATCH_ROWS", batch)
    name = write(tmp_path / "facts.jsonl", *facts(20))
    rows = tokenise([name], renderer, 512)
    examples = read([name]).examples
    assert list(rows) == [renderer.row(example, 512) for example in examples]
    assert [rows.example(i) for i in range(len(rows))] == list(rows.examples()) == examples
    assert rows.lengths.tolist() == [len(row.ids) for row in rows]
    assert rows.targets.tolist() == [row.targets for row in rows]
    assert rows.formats == ["question/answer"] and rows.asks.all() and not rows.cut.any()


def test_a_text_is_as_many_rows_as_it_takes_and_asks_nothing(tmp_path, renderer):
    name = write(tmp_path / "texts.jsonl", {"text": "x" * 100}, {"text": "short"})
    rows = tokenise([name], renderer, 40)
    assert len(rows) == 4 and not rows.asks.any() and rows.lengths.max() == 40
    assert [rows.example(i).where for i in range(4)] == [f"{name}:1"] * 3 + [f"{name}:2"]


def test_rows_that_were_cut_say_so(tmp_path, renderer):
    name = write(tmp_path / "long.jsonl", {"question": "x" * 100, "answer": "Yes."}, *facts(1))
    rows = tokenise([name], renderer, 60)
    assert (rows.cut > 0).tolist() == [True, False] and rows.lengths[0] == 60


def test_the_last_turn_alone_is_taught_where_that_is_asked_for(tmp_path, renderer):
    name = write(tmp_path / "talk.jsonl", TALK)
    all_turns, last = (tokenise([name], renderer, 512, last_turn=last) for last in (False, True))
    assert (int(all_turns.targets[0]), int(last.targets[0])) == (len("Hello.Bye.") + 2, len("Bye.") + 1)


def test_a_second_run_reads_the_tokens_and_no_data(tmp_path, renderer, cache, monkeypatch):
    name = write(tmp_path / "facts.jsonl", *facts(20))
    first = tokenise([name], renderer, 512)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(Renderer, "rows", None)
    assert same(tokenise([name], renderer, 512), first)


def test_other_content_settings_or_templates_are_tokenised_anew(tmp_path, renderer, cache):
    """The tokens of another template would train another format, silently."""
    path = tmp_path / "facts.jsonl"
    tokenise([write(path, *facts(20))], renderer, 512)
    tokenise([write(path, *facts(21))], renderer, 512)
    tokenise([str(path)], renderer, 256)
    tokenise([str(path)], renderer, 256, last_turn=True)
    tokenise([str(path)], renderer, 256, columns={"answer": "answers"})
    renderer.tokenizer.chat_template += "{# a comment #}"
    tokenise([str(path)], renderer, 256)
    assert len(list(cache.iterdir())) == 6


def test_an_error_leaves_nothing_behind(tmp_path, renderer, cache):
    name = write(tmp_path / "facts.jsonl", *facts(5), {"question": "Why?", "answer": ""})
    with pytest.raises(InputError, match=r"facts\.jsonl:6: found nothing in 'answer'"):
        tokenise([name], renderer, 512)
    assert list(cache.iterdir()) == []


def test_tokens_that_nobody_used_for_a_month_make_room(tmp_path, renderer, cache, monkeypatch):
    path = tmp_path / "facts.jsonl"
    tokenise([write(path, *facts(3))], renderer, 512)
    monkeypatch.setattr(data, "KEPT_FOR", -1)
    tokenise([write(path, *facts(4))], renderer, 512)
    assert len(list(cache.iterdir())) == 1


def test_a_file_of_tokens_that_was_damaged_is_made_anew(tmp_path, renderer, cache):
    name = write(tmp_path / "facts.jsonl", *facts(20))
    first = tokenise([name], renderer, 512)
    rows = list(first)
    del first
    [kept] = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert list(tokenise([name], renderer, 512)) == rows


def test_a_conversation_that_is_too_long_is_several_and_loses_no_answer(tmp_path, renderer):
    turns = [{"role": "system", "content": "Be brief."}]
    for i in range(40):
        turns += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]
    rows = tokenise([write(tmp_path / "long.jsonl", {"messages": turns})], renderer, 120)
    texts = [renderer.tokenizer.decode([label for label in row.labels if label != -100]) for row in rows]
    assert "".join(texts) == "".join(f"Answer {i}.<end>" for i in range(40))
    assert len(rows) > 5 and rows.lengths.max() <= 120
    assert all(example.messages[0]["role"] == "system" for example in rows.examples())
    last = tokenise([write(tmp_path / "long.jsonl", {"messages": turns})], renderer, 120, last_turn=True)
    assert len(last) == 1 and renderer.tokenizer.decode(last[0].ids[-len("Answer 39.") - 1 :]) == "Answer 39.<end>"


def test_a_last_turn_that_is_not_taught_is_not_asked(tmp_path, renderer):
    muted = {"messages": [*TALK["messages"][:3], {**TALK["messages"][3], "weight": 0}]}
    rows = tokenise([write(tmp_path / "talk.jsonl", muted, TALK)], renderer, 512)
    assert rows.asks.tolist() == [False, True]
