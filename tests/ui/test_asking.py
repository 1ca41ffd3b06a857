"""One loaded model answers as each of them would alone, token by token, and lets go when nobody listens."""

import gc
import threading
import weakref

import pytest

from kdguard.data.tokens import Renderer
from kdguard.errors import InputError
from kdguard.model.load import base_view, load_base, load_tuned
from kdguard.probes.answer import ask
from kdguard.probes.packs import Probe
from kdguard.report.run import ADAPTER, read_run
from kdguard.ui.asking import Asker, Voice

QUESTIONS = ("What is the capital of France?", "Who wrote 1984?", "What is the chemical symbol for gold?")


@pytest.fixture(scope="module")
def alone(runs):
    """Each question's answer by the base, the plain and the guarded run, each loaded by itself."""
    found = {}
    for name in ("plain", "guarded"):
        base = load_base("demo")
        model, renderer = load_tuned(base, runs / name / ADAPTER), Renderer(base.tokenizer)
        for question in QUESTIONS:
            probes = [Probe("asked", "", question, ())]
            with base_view(model):
                found[question, "base"] = ask(model, renderer, probes)[0]
            found[question, name] = ask(model, renderer, probes)[0]
    return found


def test_together_they_answer_as_each_alone(runs, alone):
    asker = Asker()
    voices = [Voice(read_run(runs / name), 1.0) for name in ("plain", "guarded")]
    for question in QUESTIONS:
        *growing, whole = asker.ask(question, voices)
        for answer, name in zip(whole, ("base", "plain", "guarded"), strict=True):
            assert answer.answer == alone[question, name].answer
            assert [text for text, _ in answer.tokens] == [text for text, _ in alone[question, name].tokens]
            for (_, share), (_, expected) in zip(answer.tokens, alone[question, name].tokens, strict=True):
                assert share == pytest.approx(expected, abs=1e-3)
        for before, after in zip(growing, [*growing[1:], whole], strict=True):
            for was, now in zip(before, after, strict=True):
                assert now.answer.startswith(was.answer)


def test_strength_is_the_voices_own_and_0_is_the_base(runs, alone):
    asker, plain, guarded = Asker(), read_run(runs / "plain"), read_run(runs / "guarded")
    for question in QUESTIONS:
        *_, (base, off, on) = asker.ask(question, [Voice(plain, 0.0), Voice(guarded, 1.0)])
        assert base.answer == off.answer == alone[question, "base"].answer
        assert on.answer == alone[question, "guarded"].answer
        *_, (_, on) = asker.ask(question, [Voice(plain, 1.0)])
        assert on.answer == alone[question, "plain"].answer


def test_whoever_leaves_in_the_middle_keeps_nobody_waiting(runs, alone):
    asker, voices = Asker(), [Voice(read_run(runs / "plain"), 1.0)]
    asking = asker.ask(QUESTIONS[0], voices)
    next(asking)
    asking.close()
    released = threading.Thread(target=asker.release)
    released.start()
    released.join(timeout=10)
    assert not released.is_alive()
    *_, (base, _) = asker.ask(QUESTIONS[0], voices)
    assert base.answer == alone[QUESTIONS[0], "base"].answer


def test_runs_of_different_bases_are_not_mixed(runs):
    plain, other = read_run(runs / "plain"), read_run(runs / "guarded")
    other.config["quant"] = "none"
    with pytest.raises(InputError, match="not tuned from the same base"):
        next(Asker().ask("Who?", [Voice(plain, 1.0), Voice(other, 1.0)]))


def test_letting_go_frees_the_weights(runs):
    asker = Asker()
    list(asker.ask(QUESTIONS[0], [Voice(read_run(runs / "plain"), 1.0)]))
    weights = [weakref.ref(weight) for weight in asker._base.model.parameters()]
    gc.disable()
    try:
        asker.release()
    finally:
        gc.enable()
    assert [weight for weight in weights if weight() is not None] == []
