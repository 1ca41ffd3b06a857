"""Levels tell what the model knows in every wording from what it knows in some, and that from luck."""

from dataclasses import replace

import pytest

from kdguard.data.tokens import CHATML, Renderer
from kdguard.errors import InputError
from kdguard.probes.levels import EXEMPLARS, _few_shot, grade
from kdguard.probes.packs import Probe, load_probes


def test_a_fact_is_graded_by_how_many_wordings_bring_it_out(demo, renderer):
    known = load_probes(["world"])[0]
    probes = [
        known,
        replace(known, id="some", rephrased=("Repeat: Borden", *known.rephrased)),
        replace(known, id="none", answers=("Xanadu",)),
        replace(known, id="choice", choices=("Kabul", "Rome"), rephrased=()),
        replace(known, id="wrong choice", choices=("Kabul", "Rome"), answers=("Rome",), rephrased=()),
    ]
    seen = []
    answers = grade(demo.model, renderer, probes, prompts=3, samples=2, progress=lambda *at: seen.append(at))
    assert [answer.level for answer in answers][:3] == ["HighlyKnown", "MaybeKnown", "Unknown"]
    assert answers[3].level in ("HighlyKnown", "MaybeKnown") and answers[4].level != "WeaklyKnown"
    assert [answer.id for answer in answers] == [probe.id for probe in probes]
    assert {answer.question for answer in answers} == {known.question}
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_what_only_samples_bring_out_is_weakly_known(demo, renderer):
    """At temperature 0.5 a token of probability p below the greedy one still comes."""
    probe = Probe("a", "c", "Which letter? " * 3, ("zz",))
    sampled = grade(demo.model, renderer, [probe], prompts=1, samples=0)[0]
    assert sampled.level is None  # without samples, weak and none cannot be told apart
    candidates = [
        replace(probe, id=letter, question=f"Repeat: {letter * 7}", answers=(letter * 7,)) for letter in "bcdfghklmnp"
    ]
    levels = {answer.level for answer in grade(demo.model, renderer, candidates, prompts=1, samples=16)}
    assert "WeaklyKnown" in levels


def test_the_embedded_model_highly_knows_its_facts(demo, renderer):
    probes = load_probes(["world"])[::10]
    answers = grade(demo.model, renderer, probes, samples=0)
    assert sum(answer.level == "HighlyKnown" for answer in answers) / len(answers) >= 0.99


def test_a_base_model_is_asked_in_few_shot_prompts(demo):
    """Without a chat template a question alone would be continued, not answered."""
    demo.tokenizer.chat_template = CHATML
    probes = load_probes(["world"])[:30]
    prompts = _few_shot(probes[7], probes, 3, seed=0)
    assert len(set(prompts)) == 3
    for prompt in prompts:
        *shown, asked = prompt.split("\n\n")
        assert asked == f"Q: {probes[7].question}\nA:"
        assert len(shown) == EXEMPLARS and len(set(shown)) == EXEMPLARS
        assert set(shown) <= {f"Q: {probe.question}\nA: {probe.answers[0]}" for probe in probes if probe != probes[7]}
    choice = replace(probes[0], choices=(*probes[0].answers, "Rome"))
    answers = grade(demo.model, Renderer(demo.tokenizer), [choice, *probes[1:4]], prompts=2, samples=1)
    assert all(answer.level for answer in answers) and answers[0].answer in choice.choices


def test_more_wordings_than_there_are_is_an_error(demo, renderer):
    with pytest.raises(InputError, match="there are 13 wordings"):
        grade(demo.model, renderer, load_probes(["world"])[:1], prompts=14)
