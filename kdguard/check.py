"""The story of `kdguard data check`: what is wrong with the rows, and what the base already knows of them."""

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from kdguard.config import TuneConfig
from kdguard.data.check import Finding, asked_by, said, shares_an_answer
from kdguard.data.formats import Example
from kdguard.data.tokens import Renderer
from kdguard.events import Events
from kdguard.model.load import load_base, load_tokenizer
from kdguard.probes.answer import MAX_NEW_TOKENS, ask
from kdguard.probes.levels import grade
from kdguard.probes.packs import Probe, load_probes
from kdguard.probes.score import LEVELS, Answer, is_correct
from kdguard.tune import new_questions, row_of


def check(examples: list[Example], config: TuneConfig, events: Events) -> dict[str, Any]:
    """What the base knows of the rows: figures, and the rows that contradict it.

    A question is asked once, however many rows repeat it: among the examples of a few-shot prompt, a second row would
    give its answer away.
    """
    probes = load_probes(config.probes)
    tokenizer = load_tokenizer(config.model, config.revision)
    renderer = Renderer(tokenizer)
    first = list({asked_by(example): example for example in reversed(examples)}.values())[::-1]
    rows = [renderer.row(example, config.max_length) for example in first]
    events.emit("phase", name="load")
    base = load_base(config.model, quant=config.quant, revision=config.revision, tokenizer=tokenizer)

    def graded(questions: list[Probe]) -> list[Answer]:
        events.emit("phase", name="grade")
        return grade(
            base.model,
            renderer,
            questions,
            prompts=config.prompts,
            samples=0,
            seed=config.seed,
            progress=events.progress("grade"),
        )

    new = new_questions(first, rows, config)
    facts = [each for each in new if len(each.messages) == 1 and rows[row_of(each.id)].targets <= MAX_NEW_TOKENS]
    others = [each for each in new if each not in facts]
    in_words = graded([replace(fact, messages=()) for fact in facts])  # other words for the turns before there are none
    events.emit("phase", name="ask new before")
    as_it_is = ask(base.model, renderer, others, progress=events.progress("ask new before"))
    known = sum(answer.correct for answer in (*in_words, *as_it_is))
    levels = Counter(answer.level for answer in in_words)

    taught = {said(example.question) for example in examples}
    old = graded([probe for probe in probes if said(probe.text) in taught])
    ...
