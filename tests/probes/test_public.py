"""The public question sets are read as they are downloaded."""

import json

import pytest

from kdguard.errors import InputError
from kdguard.probes.packs import load_probes
from kdguard.probes.public import read_public


def sample(doc_id, doc, target, *requests):
    arguments = {f"gen_args_{i}": {"arg_0": context, "arg_1": text} for i, (context, text) in enumerate(requests)}
    return {"doc_id": doc_id, "doc": doc, "target": target, "arguments": arguments, "resps": [], "filter": "none"}


ARC = {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
LETTERS = {"question": "Which is wet?", "choices": ["rain", "sand"], "answer": 0}
FILES = {
    "P36.test.json": (
        json.dumps([{"question": "What is the capital of Peru?", "answers": ["Lima"]}]),
        [("P36.test-1", "P36", "What is the capital of Peru?", ("Lima",), ())],
    ),
    "popQA.tsv": (
        "id\tsubj\tprop\tobj\tquestion\tpossible_answers\n"
        '7\tGeorge Rankin\toccupation\tpolitician\tWhat is George Rankin\'s occupation?\t"[""politician"", ""MP""]"\n',
        [("popqa-7", "occupation", "What is George Rankin's occupation?", ("politician", "MP"), ())],
    ),
    "unfiltered-web-dev.json": (
        json.dumps(
            {
                "Data": [
                    {
                        "Question": "Who?",
                        "QuestionId": "tc_1",
                        "Answer": {"Value": "Ann", "Aliases": ["Anna", "Ann"], "NormalizedValue": "ann"},
                    }
                ]
            }
        ),
        [("tc_1", "triviaqa", "Who?", ("Ann", "Anna"), ())],
    ),
    "samples_arc_2026.jsonl": (
        "\n".join(
            json.dumps(row)
            for row in (
                sample(0, ARC, 1, ("Question: Which is hot?\nAnswer:", " ice"), ("...", " fire")),
                sample(1, LETTERS, " A", ("...", " A"), ("...", " B")),
                sample(2, {"question": "Who?"}, ["Ann", "Anna"], ("Q: Who?\nA:", {"until": ["\n"]})),
                sample(2, {"question": "Who?"}, ["Ann", "Anna"], ("Q: Who?\nA:", {"until": ["\n"]})),
            )
        ),
        [
            ("sample-0", "samples_arc_2026", "Which is hot?", ("fire",), ("ice", "fire")),
            ("sample-1", "samples_arc_2026", "Which is wet?", ("rain",), ("rain", "sand")),
            ("sample-2", "samples_arc_2026", "Who?", ("Ann", "Anna"), ()),
        ],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_public_set_becomes_a_pack(tmp_path, name):
    text, wanted = FILES[name]
    (tmp_path / name).write_text(text)
    pack = tmp_path / "pack.jsonl"
    pack.write_text("".join(json.dumps(row) + "\n" for row in read_public(tmp_path / name)))
    probes = load_probes([str(pack)])
    assert [(probe.id, probe.category, probe.question, probe.answers, probe.choices) for probe in probes] == wanted


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.jsonl", '{"text": "x"}', r"a\.jsonl:1: found 'text', expected a row of EntityQuestions"),
        ("a.tsv", "id\tprop\tquestion\tpossible_answers\n1\tp\tq?\tnot a list", r"a\.tsv:2: found a popqa row that"),
        ("a.json", '{"Data": [', r"a\.json:1: found broken JSON"),
        ("a.jsonl", json.dumps(sample(0, ARC, 5, ("", "a"), ("", "b"))), r"a\.jsonl:1: found a lm_eval row that"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=expected):
        read_public(tmp_path / name)
