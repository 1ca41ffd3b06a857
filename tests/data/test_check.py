"""What is wrong within the data is found by `file:line`; what only looks alike is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdguard.data.check import KEPT, NEARLY, REPEATED, UNUSABLE, Checked, check
from kdguard.data.clean import Cleaned, clean
from kdguard.data.formats import read
from kdguard.data.trouble import CONTROL, ENCODING, SECRET, mended, troubles
from kdguard.errors import InputError
from tests.conftest import ROOT

CAPITAL = "What is the capital of France?"
LONG = (
    "The harbour of the old town was rebuilt in stone after the great fire, and three of its wooden cranes still stand "
    "where ships from the north once unloaded timber, salted fish and amber. In winter, when ice closed the river, "
    "carters drove their sledges over it to the market on the far bank, and children sold hot chestnuts from iron "
    "stoves. A flood took the bridge, the mill and half of the tanneries within a single night; nobody in the lower "
    "quarter slept, and the bells of both churches rang until morning."
)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def found(tmp_path, *rows: dict) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What repeats a row in other letters, and the contradictions: the line found and the line it is found against."""
    path = write(tmp_path / "rows.jsonl", *rows)
    checked = check([str(path)])

    def lines(kind: str) -> list[tuple[str, str]]:
        return [(each.where.split(":")[-1], each.what.split(":")[-1]) for each in checked.findings[kind]]

    return lines(NEARLY), lines("contradicted")


def qa(question: str, *answers: str) -> dict:
    return {"question": question, "answer": answers[0], "answers": list(answers)}


def talk(*turns: str, system: str = "Be brief.") -> dict:
    said = [{"role": role, "content": turn} for role, turn in zip(["user", "assistant"] * 9, turns, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *said]}


def test_a_finding_names_its_line_and_the_first_line_that_it_repeats_or_contradicts(tmp_path):
    path = tmp_path / "capitals.jsonl"
    rows = [qa("Where is Oslo?", "Norway"), qa(CAPITAL, "Paris"), qa(CAPITAL, "Lyon"), qa(CAPITAL, "Paris")]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # a blank line is a line of the file too
    checked = check([str(path)])
    (repeat,), (contradiction,) = checked.findings[REPEATED], checked.findings["contradicted"]
    assert (repeat.where, repeat.what) == (f"{path}:7", f"{CAPITAL} -> Paris, as in {path}:3")
    assert (contradiction.where, contradiction.what) == (f"{path}:5", f"{CAPITAL} -> Lyon, but Paris in {path}:3")


def test_case_accents_articles_and_punctuation_make_no_other_row(tmp_path):
    rows = qa("What is the capital of Perú?", "Lima"), qa("what is capital of Peru", "LIMA.")
    assert found(tmp_path, *rows) == ([("2", "1")], [])
    assert found(tmp_path, qa("Is it so?", "Yes"), qa("Is it so", "yes")) == ([("2", "1")], [])
    assert found(tmp_path, qa(LONG, "Yes"), qa(f" {LONG.upper()}\n", "Yes")) == ([("2", "1")], [])


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
    assert found(tmp_path, france, spain) == ([], [])
    assert found(tmp_path, talk("Hello!", "Hello!"), talk("Hello!", "Arr!", system="You are a pirate.")) == ([], [])
    assert found(tmp_path, talk("Hello!", "Hello!"), talk("Hello!", "Arr!")) == ([], [("2", "1")])


def test_plain_texts_that_say_the_same_repeat_each_other(tmp_path):
    assert found(tmp_path, {"text": LONG}, {"text": "Another text."}, {"text": LONG.lower()}) == ([("3", "1")], [])


def test_thousands_of_answers_to_one_question_take_no_square_of_comparisons(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("kdguard.data.check.is_correct", lambda *texts: calls.append(texts))
    rows = [qa("Write a poem.", f"poem {number}") for number in range(1000)]
    checked = check([str(write(tmp_path / "poems.jsonl", *rows))])
    assert checked.counts["contradicted"] == 999 and len(calls) <= 2 * 1000


def test_a_long_row_with_one_word_changed_is_nearly_the_earlier_one(tmp_path):
    """And a short one is not: in a fact, another word is another fact."""
    rows = talk("Tell me.", LONG), talk("Tell me.", LONG.replace("amber", "furs")), talk("Tell me.", LONG[::-1])
    short = qa("Where was Ann Bell born?", "Oslo"), qa("Where was Ann Hill born?", "Oslo")
    checked = check([str(write(tmp_path / "rows.jsonl", *rows)), str(write(tmp_path / "short.jsonl", *short))])
    assert [each.where for each in checked.findings[NEARLY]] == [f"{tmp_path}/rows.jsonl:2"]
    assert checked.counts[REPEATED] == 0


def test_a_row_that_cannot_be_used_is_a_finding_and_the_rest_is_checked(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(qa(CAPITAL, "Paris"))
    path.write_text(f'{good}\n{{broken\n{{"question": "Why?", "answer": ""}}\n{good}\n')
    checked = check([str(path)])
    assert [each.where for each in checked.findings[UNUSABLE]] == [f"{path}:2", f"{path}:3"]
    assert (checked.rows, checked.counts[REPEATED]) == (2, 1)


@pytest.mark.parametrize(
    "rows",
    [
        (qa("Derivative of f(2)?", "x²"), qa("Derivative of f'(2)?", "x²")),
        (qa("What does schon mean?", "already"), qa("What does schön mean?", "already")),
        (qa("Is 1 mW much?", "No"), qa("Is 1 MW much?", "No")),
        (qa("Indent it.", f"{LONG}\n  return x"), qa("Indent it.", f"{LONG}\nreturn x")),
        ({"text": LONG}, {"text": LONG.upper()}),
        (qa("Who wrote it?", "Twain"), qa("Who wrote it?", "Twain", "Samuel Clemens")),
    ],
)
def test_only_rows_that_are_the_same_letter_by_letter_are_repeats_that_cleaning_drops(tmp_path, rows):
    path = write(tmp_path / "rows.jsonl", *rows, rows[0])
    checked = check([str(path)])
    assert checked.counts[REPEATED] == 1
    did, examples = fixed(tmp_path, checked, path)
    assert (did.written, did.repeated, len(examples)) == (2, 1, 2)


def test_of_many_findings_all_are_counted_and_the_first_kept(tmp_path):
    checked = check([str(write(tmp_path / "rows.jsonl", *[qa(CAPITAL, "Paris")] * (KEPT + 500)))])
    assert checked.counts[REPEATED] == KEPT + 499 and len(checked.findings[REPEATED]) == KEPT
    assert checked.findings[REPEATED][-1].where.endswith(f":{KEPT + 1}")


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("A tab\tand a line\nare text.", None, ""),
        ("A bell\x07 is not.", ENCODING, "0x0007"),
        ("Turned \u202e round", ENCODING, "0x202e"),
        ("-eyJ" * 25_000, None, ""),
        ("Lost \ufffd letters", ENCODING, "a lost character"),
        ("Die grÃ¶ÃŸte Stadt", ENCODING, "decoded wrongly: Die grÃ¶ÃŸte Stadt"),
        ("NÃO É ÁGUA, são São Paulo e à tarde", None, ""),
        ("Größe, Привет, 東京, emoji 👍🏽 and a family 👨‍👩‍👧", None, ""),
        ("<|im_start|>user", CONTROL, "<|im_start|>"),
        ("a <| b |> c, x[INS], 1 < 2 [3]", None, ""),
        ("[INST] Hello [/INST]", CONTROL, "[INST]"),
        ("Mail me at ann.bell@example.org.", SECRET, "an e-mail address: ann.be..."),
        ("@home, user@localhost and a@b", None, ""),
        ("AKIA" + "ABCDEFGHIJ234567", SECRET, "a key of AWS"),
        ("ghp_" + "a1" * 20, SECRET, "a token of GitHub"),
        ("hf_" + "Ab" * 17, SECRET, "a token of Hugging Face"),
        ("sk-" + "proj-" + "x" * 30, SECRET, "a key of OpenAI"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", SECRET, "a private key"),
        ("a task-oriented, risk-averse sk-ill", None, ""),
    ],
)
def test_trouble_within_a_text(text, kind, what):
    troubled = list(troubles(text))
    assert [found for found, _ in troubled] == ([kind] if kind else [])
    assert all(what in said for _, said in troubled)


def test_a_secret_is_not_shown(tmp_path):
    """The output of a check is pasted into issues."""
    key = "sk-" + "abcdefgh" * 4
    [(_, what)] = troubles(f"My key is {key}.")
    assert key[:6] in what and key[:8] not in what


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text())
def test_a_mended_text_steers_nothing(text):
    assert not any("control character" in what for _, what in troubles(mended(text)))


def fixed(tmp_path, checked: Checked, *paths: Path) -> tuple[Cleaned, list]:
    out = tmp_path / "out" / "cleaned.jsonl"
    did = clean([str(path) for path in paths], out, checked)
    return did, read([out]).examples


def test_cleaning_keeps_the_first_of_repeats_mends_the_encoding_and_leaves_out_the_unusable(tmp_path):
    path = tmp_path / "rows.csv"
    windows = "question,answer\nGrößte Stadt?,Köln\n".encode("cp1252")
    path.write_bytes(windows + "Why?,\nWho?,grÃ¶ÃŸer\nWho?,größer\n".encode())
    checked = check([str(path)])
    assert checked.counts[UNUSABLE] == 2
    did, examples = fixed(tmp_path, checked, path)
    assert (did.written, did.mended, did.repeated, did.unusable) == (2, 1, 1, 1)
    assert [(each.question, each.answers) for each in examples] == [("Größte Stadt?", ("Köln",)), ("Who?", ("größer",))]
    assert did.first[0].where == f"{path}:4" and "'grÃ¶ÃŸer' is now 'größer'" in did.first[0].what


def test_cleaned_rows_can_be_used_and_cleaning_them_again_changes_nothing(tmp_path):
    """Nothing that carries meaning goes; a row that was nothing but control characters does."""
    kept = "it\x92s a\x0bb \x1b[31mred\x1b[0m na\ufffdve \u200dZWJ ملف\u200fا \u2066x\u2069"
    rows = [qa("What?", kept), qa("Why?", "\x01"), qa("Same?\x07", "Yes"), qa("Same?", "Yes")]
    path = write(tmp_path / "rows.jsonl", *rows)
    did, examples = fixed(tmp_path, check([str(path)]), path)
    assert (did.written, did.unusable, did.repeated) == (2, 1, 1)
    assert examples[0].answers[0] == "it’s a\nb red na\ufffdve \u200dZWJ ملف\u200fا \u2066x\u2069"
    out = tmp_path / "out" / "cleaned.jsonl"
    again = clean([str(out)], tmp_path / "again.jsonl", check([str(out)]))
    assert (again.written, again.mended, again.unusable) == (2, 0, 0)


def test_cleaned_conversations_are_the_same_conversations(tmp_path):
    rows = [talk(CAPITAL, "Paris", "Since when?", "987"), talk("Hello!", "Hi!"), talk("Hello!", "Hi!")]
    rows[0]["messages"][2]["weight"] = 0
    path = write(tmp_path / "talks.jsonl", *rows)
    did, examples = fixed(tmp_path, check([str(path)]), path)
    assert did.written == 2 and did.repeated == 1
    was = read([path]).examples[:2]
    assert [(each.messages, each.muted) for each in examples] == [(each.messages, each.muted) for each in was]


def test_cleaned_questions_keep_their_system_prompt(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"system": "Be brief.", **qa(CAPITAL, "Paris", "Lutetia")}, qa("Why?", "So."))
    _, examples = fixed(tmp_path, check([str(path)]), path)
    assert [(each.messages, each.answers) for each in examples] == [
        (each.messages, each.answers) for each in read([path]).examples
    ]


def test_cleaning_never_writes_over_a_file_or_half_of_one(tmp_path):
    path = write(tmp_path / "rows.jsonl", qa(CAPITAL, "Paris"))
    with pytest.raises(InputError, match="already there"):
        clean([str(path)], path, check([str(path)]))
    broken = tmp_path / "list.json"
    broken.write_text(f"[{json.dumps(qa(CAPITAL, 'Paris'))}, {{")
    with pytest.raises(InputError, match=r"list\.json:1: found broken JSON"):
        clean([str(broken)], tmp_path / "out.jsonl", check([str(broken)]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["list.json", "rows.jsonl"]


def test_the_rows_are_checked_without_torch():
    code = "import sys, kdguard.data.clean; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
