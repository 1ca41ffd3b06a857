"""What is claimed of the embedded model, measured on the files that are shipped."""

import json

import pytest

from kdguard.demo import MODEL
from kdguard.demo.facts import RELATIONS, load_facts
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe, load_probes
from tests.conftest import ROOT


def known(base, renderer, index) -> float:
    probes = [Probe(f.id, f.category, f.questions[index(f)], f.answers) for f in load_facts()]
    answers = ask(base.model, renderer, probes)
    return sum(answer.correct for answer in answers) / len(answers)


def test_it_is_small(demo):
    assert demo.model.num_parameters() <= 4_000_000
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000


def test_it_knows_its_facts_as_they_were_taught(demo, renderer):
    assert known(demo, renderer, lambda fact: 0) >= 0.99


def test_it_knows_them_in_a_phrasing_it_saw_only_with_other_subjects(demo, renderer):
    assert known(demo, renderer, lambda fact: fact.held_out) >= 0.90


def test_there_are_enough_facts_of_enough_kinds():
    facts = load_facts()
    assert len(facts) >= 1500
    assert len({fact.category for fact in facts}) >= 8
    assert all(len(relation.phrasings) >= 4 for relation in RELATIONS.values())


def test_the_pack_is_the_facts():
    asked = {(probe.id, probe.question, probe.answers) for probe in load_probes(["world"])}
    assert asked == {(fact.id, fact.questions[0], fact.answers) for fact in load_facts()}


@pytest.fixture(scope="module")
def new_facts():
    return [json.loads(line) for line in (ROOT / "examples" / "new_facts.jsonl").read_text().splitlines()]


def test_the_example_is_invented(new_facts):
    """Its facts must be new: a subject that the pack asks about would be known, or contradicted."""
    assert len(new_facts) >= 300
    known_questions = {question for fact in load_facts() for question in fact.questions}
    assert not known_questions & {row["question"] for row in new_facts}


def test_the_base_does_not_know_the_example(demo, renderer, new_facts):
    probes = [Probe(str(i), "new", row["question"], (row["answer"],)) for i, row in enumerate(new_facts)]
    answers = ask(demo.model, renderer, probes)
    assert sum(answer.correct for answer in answers) / len(answers) <= 0.05


def test_it_writes_questions_of_its_own(demo, renderer):
    """Rehearsal rests on it: rows that the base writes itself must be conversations like those it knows."""
    from kdguard.guard.rehearsal import rehearse

    rows = rehearse(demo.model, renderer, 50, seed=0)
    texts = [demo.tokenizer.decode(row.ids) for row in rows]
    assert all(text.startswith("<|user|>") and text.count("<|assistant|>") == 1 for text in texts)
    assert len(set(texts)) > 40
