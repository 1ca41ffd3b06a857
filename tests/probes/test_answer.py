"""Answers in batches are the answers one by one, and asking leaves the model as it was."""

from dataclasses import replace

import pytest
import torch

from kdguard.probes.answer import ArithmeticSampling, ask, pieces, room_for
from kdguard.probes.packs import Probe, load_probes


def test_a_batch_answers_as_each_alone(demo, renderer):
    probes = load_probes(["world"])[::97]
    probes[3] = replace(probes[3], choices=(*probes[3].answers, "Hamlet", "a much longer choice"))
    together = ask(demo.model, renderer, probes)
    alone = [ask(demo.model, renderer, [probe])[0] for probe in probes]
    assert [replace(answer, tokens=()) for answer in together] == [replace(answer, tokens=()) for answer in alone]


def test_a_choice_is_the_likeliest_a_byte(demo, renderer):
    """Against the sum over one forward a choice, unpadded."""
    probe = load_probes(["world"])[0]
    choices = (*probe.answers, "Rome", "Vladivostok", "Ulan Bator")
    answer = ask(demo.model, renderer, [replace(probe, choices=choices)])[0]
    scores = []
    for choice in choices:
        prompt = renderer.prompt("\n- ".join((probe.question, *choices)))
        reply = renderer.tokenizer(choice)["input_ids"]
        with torch.no_grad():
            logits = demo.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].float()
        wanted = logits.log_softmax(-1)[range(len(reply)), reply].sum().item()
        scores.append(wanted / len(choice.encode()))
    assert answer.answer == choices[scores.index(max(scores))] and answer.correct
    share = torch.tensor(scores).softmax(-1).max().item()
    assert answer.tokens[0][0] == answer.answer and abs(answer.tokens[0][1] - share) < 2e-3


def test_thepieces_of_an_answer_have_the_probabilities_of_its_tokens(demo, renderer):
    probe = Probe("b", "c", "What is the currency of Brazil?", ("Brazilian real",))
    answer = ask(demo.model, renderer, [probe])[0]
    assert "".join(text for text, _ in answer.tokens) == answer.answer
    prompt, reply = renderer.prompt(probe.question), renderer.tokenizer(answer.answer)["input_ids"]
    with torch.no_grad():
        logits = demo.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].float()
    wanted = logits.softmax(-1)[range(len(reply)), reply].tolist()
    assert [share for _, share in answer.tokens] == pytest.approx(wanted, abs=2e-3)


def test_a_character_of_several_tokens_is_one_piece(renderer):
    ids = renderer.tokenizer("日b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert pieces(renderer, ids, [0.9, 0.5, 0.8, 0.7]) == (("日", 0.5), ("b", 0.7))


def test_answers_come_in_the_order_of_the_probes(demo, renderer):
    probes = load_probes(["world"])[:20][::-1]
    assert [answer.id for answer in ask(demo.model, renderer, probes)] == [probe.id for probe in probes]


def test_asking_leaves_the_mode_of_the_model(demo, renderer):
    for training in (True, False):
        demo.model.train(training)
        ask(demo.model, renderer, load_probes(["world"])[:1])
        assert demo.model.training is training


def test_progress_tells_the_total_at_once_and_reaches_it(demo, renderer, monkeypatch):
    monkeypatch.setattr("kdguard.model.memory.batch_rows", lambda model, tokens: 4)
    seen = []
    ask(demo.model, renderer, load_probes(["world"])[:10], progress=lambda *at: seen.append(at))
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_a_long_lesson_gets_room_for_its_answer(demo, renderer):
    """A training answer longer than the room for answers could never count as learned."""
    text = "word " * 60
    lesson = Probe("row-1", "new", "q", (text,), messages=({"role": "user", "content": "q"},))
    assert room_for(renderer, lesson, 32) >= len(renderer.tokenizer(text)["input_ids"])
    assert room_for(renderer, Probe("a", "c", "q", (text,)), 32) == 32


def test_evenly_spaced_codes_spread_over_the_distribution():
    """Arithmetic sampling: a sequence of probability p comes at least floor(n p) times among n evenly spaced codes."""
    torch.manual_seed(0)
    first, then = torch.randn(5), torch.randn(5, 5)  # a little model of two tokens
    n = 1000
    sampler = ArithmeticSampling([(i + 0.3) / n for i in range(n)])
    one = sampler(None, first.expand(n, 5)).argmax(-1)
    two = sampler(None, then[one]).argmax(-1)
    for i in range(5):
        for j in range(5):
            p = first.softmax(-1)[i] * then.softmax(-1)[i, j]
            assert abs(int(((one == i) & (two == j)).sum()) - n * p) <= 2


def test_a_worn_out_code_goes_on_as_a_fresh_one():
    """A code holds some fifty bits; after them every row would otherwise decode alike."""
    torch.manual_seed(0)
    sampler = ArithmeticSampling(torch.rand(4000, dtype=torch.float64).tolist())
    flat = torch.zeros(4000, 64)
    for _ in range(40):
        counts = sampler(None, flat).argmax(-1).bincount(minlength=64)
    assert counts.min() > 30 and counts.max() < 100


def test_codes_never_take_a_token_of_no_probability():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for code in (0.0, 0.49999, 0.5, 1 - 1e-16):
        assert ArithmeticSampling([code])(None, scores).argmax(-1).item() in (1, 3)
