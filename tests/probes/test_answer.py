"""Answers in batches are the answers one by one, and asking leaves the model as it was."""

from kdguard.probes.answer import _room, ask
from kdguard.probes.packs import Probe, load_probes


def test_a_batch_answers_as_each_alone(demo, renderer):
    probes = load_probes(["world"])[::97]
    together = ask(demo.model, renderer, probes)
    alone = [ask(demo.model, renderer, [probe])[0] for probe in probes]
    assert together == alone


def test_answers_come_in_the_order_of_the_probes(demo, renderer):
    probes = load_probes(["world"])[:20][::-1]
    assert [answer.id for answer in ask(demo.model, renderer, probes)] == [probe.id for probe in probes]


def test_asking_leaves_the_mode_of_the_model(demo, renderer):
    for training in (True, False):
        demo.model.train(training)
        ask(demo.model, renderer, load_probes(["world"])[:1])
        assert demo.model.training is training


def test_progress_tells_the_total_at_once_and_reaches_it(demo, renderer, monkeypatch):
    monkeypatch.setattr("kdguard.probes.answer.batch_rows", lambda model, tokens: 4)
    seen = []
    ask(demo.model, renderer, load_probes(["world"])[:10], progress=lambda *at: seen.append(at))
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_a_long_lesson_gets_room_for_its_answer(demo, renderer):
    """A training answer longer than the room for answers could never count as learned."""
    text = "word " * 60
    lesson = Probe("row-1", "new", "q", (text,), messages=({"role": "user", "content": "q"},))
    assert _room(renderer, lesson, 32) >= len(renderer.tokenizer(text)["input_ids"])
    assert _room(renderer, Probe("a", "c", "q", (text,)), 32) == 32
