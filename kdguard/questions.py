"""What a run asks: its probes and its training questions, and both again, of its base, once it has finished."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdguard.config import TuneConfig
from kdguard.data.rows import Rows, tokenise
from kdguard.data.tokens import Renderer
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.model.fingerprint import of_base, refuse_other_base
from kdguard.model.load import Base, load_base, load_tokenizer, own_tokenizer
from kdguard.probes.packs import Probe, load_probes
from kdguard.report import run as run_folder
from kdguard.report.run import Run

MAX_NEW_QUESTIONS = 500  # training questions asked before and after; a seeded sample of more rows


def read_data(config: TuneConfig, renderer: Renderer, events: Events) -> Rows:
    """The training rows, with progress. Raises InputError for the first that cannot be used."""
    events.emit("phase", name="read")
    return tokenise(
        config.data,
        renderer,
        config.max_length,
        columns=config.columns,
        last_turn=config.last_turn,
        progress=events.progress("read"),
    )


def new_questions(rows: Rows, config: TuneConfig, among: NDArray[np.intp] | None = None) -> list[Probe]:
    """What the training rows teach, as questions: everything before the last answer, and that answer.

    Plain text asks nothing, and rows that were cut are not asked; of more than MAX_NEW_QUESTIONS a seeded sample is.
    among: places of rows, where not all are meant.
    """
    whole = np.flatnonzero(rows.asks & (rows.cut == 0))
    if among is not None:
        whole = np.intersect1d(whole, among)
    if len(whole) > MAX_NEW_QUESTIONS:
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(config.seed))
        whole = np.sort(whole[order[:MAX_NEW_QUESTIONS].numpy()])
    examples = {place: rows.example(place) for place in whole.tolist()}
    return [
        Probe(f"row-{place + 1}", "new", example.question, example.answers, messages=example.messages[:-1])
        for place, example in examples.items()
    ]


@dataclass(frozen=True)
class Asked:
    """What a finished run was trained on and asked: its rows if they are known, its probes by id, and the questions."""

    renderer: Renderer
    rows: Rows | None
    probes: dict[str, Probe]
    new: list[Probe]


def asked_in(run: Run, config: TuneConfig, events: Events) -> Asked:
    """Read a finished run's data and probes again. Raises InputError when those have changed."""
    tokenizer = own_tokenizer(run.path / run_folder.ADAPTER) or load_tokenizer(
        config.model, config.revision, trust_remote_code=config.trust_remote_code
    )
    renderer = Renderer(tokenizer)
    rows = read_data(config, renderer, events) if config.data else None
    new = new_questions(rows, config) if rows else []
    probes = {probe.id: probe for probe in load_probes(config.probes)}
    for what, now, then in (
        (config.data_name, {probe.id: probe for probe in new}, run.new),
        (", ".join(config.probes), probes, [*run.probes, *run.watched]),
    ):
        same = all(
            (probe := now.get(pair.before.id))
            and (probe.question, probe.answers) == (pair.before.question, pair.before.answers)
            for pair in then
        )
        if not same or len(now) != len(then):
            raise InputError(f"{what} has changed since this run", "put the old file back, or tune again")
    return Asked(renderer, rows, probes, new)


def base_in(run: Run, config: TuneConfig, renderer: Renderer, events: Events) -> Base:
    """Load a finished run's base again. Raises InputError when it is not what the run was trained on."""
    events.emit("phase", name="load")
    base = load_base(
        config.model,
        quant=config.quant,
        revision=config.revision,
        tokenizer=renderer.tokenizer,
        trust_remote_code=config.trust_remote_code,
    )
    refuse_other_base(run.path / run_folder.FINGERPRINT, base.name, of_base(base), events)
    return base


def row_of(question_id: str) -> int:
    """The place among the training rows that `new_questions` asked with this id."""
    return int(question_id.removeprefix("row-")) - 1
