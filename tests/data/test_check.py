"""What is wrong within the data is found by `file:line`; what only looks alike is not."""

import json
import subprocess
import sys

from kdguard.data.check import find
from kdguard.data.formats import read
from tests.conftest import ROOT

CAPITAL = "What is the capital of France?"


def found(tmp_path, *rows: dict) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The duplicates and the contradictions, each as the line found and the line it is found against."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    duplicates, contradictions = (
        [(each.where.removeprefix(f"{path}:"), each.against.removeprefix(f"{path}:")) for each in findings]
        for findings in find(read(path).examples)
    )
    return duplicates, contradictions


def qa(question: str, *answers: str) -> dict:
    return {"question": question, "answer": answers[0], "answers": list(answers)}


def talk(*turns: str, system: str = "Be brief.") -> dict:
    said = [{"role": role, "content": turn} for role, turn in zip(["user", "assistant"] * 9, turns, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *said]}


def test_a_finding_names_its_line_and_the_first_line_that_it_repeats_or_contradicts(tmp_path):
    path = tmp_path / "capitals.jsonl"
    rows = [qa("Where is Oslo?", "Norway"), qa(CAPITAL, "Paris"), qa(CAPITAL, "Lyon"), qa(CAPITAL, "Paris")]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # a blank line is a line of the file too
    (duplicate,), (contradiction,) = find(read(path).examples)
    assert (duplicate.where, duplicate.against) == (f"{path}:7", f"{path}:3")
    assert (contradiction.where, contradiction.against) == (f"{path}:5", f"{path}:3")
    assert (contradiction.question, contradiction.answer, contradiction.other) == (CAPITAL, "Lyon", "Paris")


def test_case_accents_articles_and_punctuation_make_no_other_row(tmp_path):
    rows = qa("What is the capital of Perú?", "Lima"), qa("what is capital of Peru", "LIMA.")
    assert found(tmp_path, *rows) == ([("2", "1")], [])
    assert found(tmp_path, qa("Is it so?", "Yes"), qa("Is it so", "yes")) == ([("2", "1")], [])


def test_an_accepted_answer_in_common_is_no_contradiction(tmp_path):
    rows = qa("Who wrote it?", "Twain", "Samuel Clemens"), qa("Who wrote it?", "Samuel Clemens")
    assert found(tmp_path, *rows) == ([], [])
    assert found(tmp_path, qa(CAPITAL, "Paris"), qa(CAPITAL, "The capital of France is Paris.")) == ([], [])
    assert found(tmp_path, *rows, qa("Who wrote it?", "Melville")) == ([], [("3", "1")])


def test_signs_tell_questions_and_answers_apart_that_have_the_same_words(tmp_path):
    sums = qa("What is 5 + 3?", "8"), qa("What is 5 - 3?", "2"), qa("What is 5 × 3?", "15"), qa("What is 5 * 3?", "15")
    assert found(tmp_path, *sums) == ([], [])
    vowels = qa("कि का अर्थ क्या है?", "that"), qa("की का अर्थ क्या है?", "of")
    assert found(tmp_path, *vowels) == ([], [])
    assert found(tmp_path, qa("Which sign adds?", "+"), qa("Which sign adds?", "-")) == ([], [("2", "1")])


def test_turns_before_the_last_question_are_part_of_it(tmp_path):
    france, spain = talk(CAPITAL, "Paris", "Since when?", "987"), talk("And Spain?", "Madrid", "Since when?", "1561")
    assert found(tmp_path, france, spain, france) == ([("3", "1")], [])
    assert found(tmp_path, talk("Hello!", "Hello!"), talk("Hello!", "Arr!", system="You are a pirate.")) == ([], [])
    assert found(tmp_path, talk("Hello!", "Hello!"), talk("Hello!", "Arr!")) == ([], [("2", "1")])


def test_thousands_of_answers_to_one_question_take_no_square_of_comparisons(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("kdguard.data.check.is_correct", lambda *texts: calls.append(texts))
    rows = [qa("Write a poem.", f"poem {number}") for number in range(1000)]
    _, contradictions = found(tmp_path, *rows)
    assert len(contradictions) == 999 and len(calls) <= 2 * 1000


def test_the_rows_are_checked_without_torch():
    code = "import sys, kdguard.data.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
