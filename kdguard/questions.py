"""What a run asks: its probes and its training questions, and both again once it has finished."""

from dataclasses import dataclass

import torch

from kdguard.config import TuneConfig
from kdguard.data import formats
from kdguard.data.formats import Example
from kdguard.data.tokens import Renderer, Row
from kdguard.errors import InputError
from kdguard.model.load import load_tokenizer, own_tokenizer
from kdguard.probes.packs import Probe, load_probes
from kdguard.report import run as run_folder
from kdguard.report.run import Run

MAX_NEW_QUESTIONS = 500  # training questions asked before and after; a seeded sample of more rows


def new_questions(examples: list[Example], rows: list[Row], config: TuneConfig) -> list[Probe]:
    """What the training rows teach, as questions: everything before the last answer, and that answer.

    Rows that were cut to `max_length` are not asked; of more than MAX_NEW_QUESTIONS a seeded sample is.
    """
    whole = [i for i, row in enumerate(rows) if len(row.ids) < config.max_length]
    if len(whole) > MAX_NEW_QUESTIONS:
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(config.seed))
        whole = sorted(whole[i] for i in order[:MAX_NEW_QUESTIONS].tolist())
    return [
        Probe(f"row-{i + 1}", "new", examples[i].question, examples[i].answers, messages=examples[i].messages[:-1])
        for i in whole
    ]


@dataclass(frozen=True)
class Asked:
    """What a finished run was trained on and asked: its rows, its probes by id, and its training questions."""

    renderer: Renderer
    examples: list[Example]
    probes: dict[str, Probe]
    new: list[Probe]


def asked_in(run: Run, config: TuneConfig) -> Asked:
    """Read a finished run's data and probes again. Raises InputError when those have changed."""
    tokenizer = own_tokenizer(run.path / run_folder.ADAPTER) or load_tokenizer(config.model, config.revision)
    renderer = Renderer(tokenizer)
    examples = formats.read(config.data).examples if config.data else []
    new = new_questions(examples, [renderer.row(example, config.max_length) for example in examples], config)
    probes = {probe.id: probe for probe in load_probes(config.probes)}
    for what, now, then in (
        (config.data, {probe.id: probe for probe in new}, run.new),
        (", ".join(config.probes), probes, [*run.probes, *run.watched]),
    ):
        same = all(
            (probe := now.get(pair.before.id))
            and (probe.question, probe.answers) == (pair.before.question, pair.before.answers)
            for pair in then
        )
        if not same or len(now) != len(then):
            raise InputError(f"{what} has changed since this run", "put the old file back, or tune again")
    return Asked(renderer, examples, probes, new)


def row_of(question_id: str) -> int:
    """The place among the training rows that `new_questions` asked with this id."""
    return int(question_id.removeprefix("row-")) - 1
