"""The story of `kdguard data check` on a model: what the base already knows of the rows, and which contradict it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from kdguard.config import TuneConfig
from kdguard.data.check import Finding, asked_by, in_short, lengths, said, shares_an_answer
from kdguard.data.formats import Example
from kdguard.data.tokens import Renderer
from kdguard.events import Events
from kdguard.model.load import load_base, load_tokenizer
from kdguard.model.memory import at_once
from kdguard.probes.answer import MAX_NEW_TOKENS, ask
from kdguard.probes.levels import grade
from kdguard.probes.overlap import overlap, states
from kdguard.probes.packs import Probe, load_probes
from kdguard.probes.score import LEVELS, Answer, is_correct
from kdguard.questions import new_questions, read_data, row_of

AT_RISK = 20  # probes shown
SURE, UNSURE, NEVER = LEVELS[0], LEVELS[1], f"{LEVELS[2]} or {LEVELS[3]}"  # nothing is sampled to tell the last apart


def check(config: TuneConfig, events: Events) -> dict[str, Any]:
    """What the base knows of the rows, in figures, and the rows that contradict what it knows for certain.

    A question is asked once, however many rows ask it: as an example in a few-shot prompt, another row would tell the
    answer. `levels` are of facts, which are one question with a short answer; whole conversations and long answers are
    asked once, as they are.

    Raises InputError for probes, a model or rows that cannot be used.
    """
    probes = load_probes(config.probes)
    tokenizer = load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    renderer = Renderer(tokenizer)
    rows = read_data(config, renderer, events)
    asking = np.array([hash(asked_by(example)) if example.messages else 0 for example in rows.examples()])
    _, distinct = np.unique(np.where(rows.asks, asking, 0), return_index=True)
    distinct = distinct[rows.asks[distinct]]
    events.emit("phase", name="load")
    base = load_base(
        config.model,
        quant=config.quant,
        revision=config.revision,
        tokenizer=tokenizer,
        trust_remote_code=config.trust_remote_code,
    )
    at_once.tell = events.leaner

    def graded(questions: list[Probe]) -> list[Answer]:
        events.emit("phase", name="grade")
        progress = events.progress("grade")
        return grade(
            base.model, renderer, questions, prompts=config.prompts, samples=0, seed=config.seed, progress=progress
        )

    facts, others = [], []
    for question in new_questions(rows, config, distinct):
        if len(question.messages) == 1 and rows.targets[row_of(question.id)] <= MAX_NEW_TOKENS:
            facts.append(replace(question, messages=()))  # messages would be asked in their own words each time
        else:
            others.append(question)
    new = graded(facts)
    levels = Counter(answer.level or NEVER for answer in new)
    if others:
        events.emit("phase", name="ask new before")
        new += ask(base.model, renderer, others, progress=events.progress("ask new before"))
    known = sum(answer.correct for answer in new)
    wrong = {answer.id for answer in new if not answer.correct}

    lessons = [question for question in [*facts, *others] if question.id in wrong]
    by_question = {said(probe.question): probe for probe in probes if not probe.choices}
    same = [example for example in rows.examples() if said(example.question) in by_question]
    old = graded([by_question[question] for question in {said(example.question) for example in same}])
    return {
        "tokens": lengths(rows.lengths),
        "cut": int((rows.cut > 0).sum()),
        "questions": len(distinct),
        "asked": len(new),
        "known": known,
        "unknown": len(new) - known,
        "levels": {level: levels[level] for level in (SURE, UNSURE, NEVER)},
        "against_the_base": [vars(finding) for finding in against_the_base(same, old)],
        "at_risk": at_risk(base.model, renderer, probes, lessons, events) if lessons else [],
    }


def at_risk(
    model: PreTrainedModel, renderer: Renderer, probes: Sequence[Probe], lessons: Sequence[Probe], events: Events
) -> list[dict[str, Any]]:
    """The probes that overlap most with what the base does not know yet, of those that it knows: the nearest first.

    What lies near the new is forgotten first (`benchmarks/explain.py`); how much of it depends on the training.
    """
    events.emit("phase", name="overlap")
    texts = [probe.text for probe in probes] + [lesson.question for lesson in lessons]
    found = states(model, [renderer.prompt(text) for text in texts], events.progress("overlap"))
    nearest = overlap(found[: len(probes)], found[len(probes) :]).max(1)
    order = nearest.values.argsort(descending=True)[: 2 * AT_RISK].tolist()
    answers = ask(model, renderer, [probes[i] for i in order])
    return [
        {
            "id": answer.id,
            "question": answer.question,
            "answer": answer.answer,
            "overlap": round(nearest.values[i].item(), 4),
            "near": lessons[nearest.indices[i]].question,
        }
        for i, answer in zip(order, answers, strict=True)
        if answer.correct
    ][:AT_RISK]


def against_the_base(examples: Iterable[Example], old: Sequence[Answer]) -> list[Finding]:
    """Rows that ask a HighlyKnown probe, with no answer in common with it, nor with what the base answered."""
    sure = {said(answer.question): answer for answer in old if answer.level == SURE}
    return [
        Finding(example.where, f"{in_short(example)}, but the base says {answer.answer} ({answer.id})")
        for example in examples
        if (answer := sure.get(said(example.question)))
        and not shares_an_answer(example.answers, answer.answers)
        and not is_correct(answer.answer, example.answers)
    ]
