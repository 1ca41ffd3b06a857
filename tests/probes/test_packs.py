"""A pack is refused by `file:line`: a probe that is silently wrong makes the proof wrong."""

import json

import pytest

from kdguard.errors import InputError
from kdguard.probes.packs import load_probes
from kdguard.probes.score import is_correct

PROBE = {"id": "a", "category": "c", "question": "q?", "answers": ["x"]}


@pytest.mark.parametrize("name, most, kinds", [("world", 1500, 8), ("common", 500, 4)])
def test_a_shipped_pack_is_whole(name, most, kinds):
    probes = load_probes([name])
    assert len(probes) >= most
    assert len({probe.category for probe in probes}) >= kinds
    assert len({probe.question for probe in probes}) == len(probes)
    assert all(is_correct(answer, probe.answers) for probe in probes for answer in probe.answers)


@pytest.mark.parametrize("name", ["world", "common"])
def test_no_probe_is_answered_by_repeating_its_question(name):
    probes = [probe for probe in load_probes([name]) if not probe.choices]
    assert not [probe.id for probe in probes if is_correct(probe.question, probe.answers)]


def test_several_packs_at_once(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(PROBE))
    assert len(load_probes(["world", str(path)])) == len(load_probes(["world"])) + 1


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"answers": []}, r"mine\.jsonl:2: found \[\] in 'answers'"),
        ({"answers": "x"}, r"mine\.jsonl:2: found 'x' in 'answers'"),
        ({"answers": [" "]}, r"mine\.jsonl:2: found \[' '\] in 'answers'"),
        ({"question": ""}, r"mine\.jsonl:2: found no text in 'question'"),
        ({"id": "first"}, r"mine\.jsonl:2: found the id 'first' again, first in .*mine\.jsonl:1"),
    ],
)
def test_a_wrong_probe_is_named(tmp_path, change, expected):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(PROBE | {"id": "first"}) + "\n" + json.dumps(PROBE | change))
    with pytest.raises(InputError, match=expected):
        load_probes([str(path)])


def test_an_unknown_pack_names_the_shipped_ones():
    with pytest.raises(InputError, match="wrld: no such probe pack") as caught:
        load_probes(["wrld"])
    assert "world" in caught.value.hint


def test_a_csv_pack_and_what_may_be_left_out(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('question,answers,choices\nWho?,Ann | Anna,\n"Cold, or hot?",cold,cold|hot\n')
    one, two = load_probes([str(path)])
    assert (one.id, one.category, one.answers, one.choices) == ("mine-2", "mine", ("Ann", "Anna"), ())
    assert (two.id, two.answers, two.choices) == ("mine-3", ("cold",), ("cold", "hot"))


@pytest.mark.parametrize(
    "change",
    [{"choices": ["x"]}, {"choices": ["y", "z"]}, {"choices": ["x", "y", "x"]}, {"answers": ["x", "q"]}],
    ids=["one", "not the answer", "twice", "an answer that is not offered"],
)
def test_choices_have_to_hold_the_answer(tmp_path, change):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(PROBE | {"choices": ["x", "y"]} | change))
    with pytest.raises(InputError, match=r"mine\.jsonl:1: found the choices .* expected two or more different ones"):
        load_probes([str(path)])
