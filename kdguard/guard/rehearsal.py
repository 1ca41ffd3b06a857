"""Rehearsal rows: conversations that the base writes itself, questions and answers, from an empty user's turn.

What is never rehearsed is what is forgotten. So the questions are spread over all that the base may ask (arithmetic
sampling), and none is asked twice: at the same number of rows fewer facts are left out than by independent samples.

Sources: self-synthesized rehearsal (arXiv 2403.01244); sampling an instruct model from the template's empty user turn
(Magpie, arXiv 2406.08464); arithmetic sampling (arXiv 2210.15458).
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from transformers import PreTrainedModel

from kdguard.data import IGNORE
from kdguard.data.tokens import Renderer, Row
from kdguard.errors import InputError
from kdguard.files import reason, write_jsonl
from kdguard.model.memory import in_batches
from kdguard.probes.answer import ArithmeticSampling, generate

REHEARSAL = "rehearsal.jsonl"  # beside the checkpoints
ROUNDS = 4  # how often `n` questions are written, at most
ENOUGH = 0.9  # of `n` different questions; and a round that adds less than the rest is the last
_IDS = TypeAdapter(Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)])


def rehearse(
    model: PreTrainedModel,
    renderer: Renderer,
    n: int,
    *,
    seed: int,
    spread: bool = True,
    max_new_tokens: int = 128,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Let `model`, the base, write at most `n` rows without targets, no question twice, in random order.

    Questions are sampled at temperature 1 and answered greedily: a sampled answer to what the base barely knows would
    often be a wrong one, and the right one stay unguarded. A base that repeats itself is asked on, up to ROUNDS times
    `n` questions; one that has said nearly all it knows ends with fewer rows.

    spread: questions by evenly spaced codes; else independent of each other. max_new_tokens: the longest question and
    the longest answer.
    """
    prefix, ending = renderer.user_prefix(), renderer.after_user_turn()
    room = len(prefix) + len(ending) + 2 * max_new_tokens
    stop = [token for token in ending if token in renderer.control][:1]
    rng = random.Random(seed)
    shift = rng.random()  # one for all codes: they stay evenly spaced, and finer with each round
    questions: dict[tuple[int, ...], None] = {}
    rows: list[Row] = []
    total = 2 * n  # questions, then answers

    def written(codes: list[float]) -> list[list[int]]:
        return generate(
            model,
            renderer,
            [prefix] * len(codes),
            max_new_tokens=max_new_tokens,
            processors=[ArithmeticSampling(codes)],
            stop=stop,
        )

    progress(0, total)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for turn in range(ROUNDS):
            before = len(questions)
            codes = [(i + (turn + shift) / ROUNDS) / n if spread else rng.random() for i in range(n)]
            rng.shuffle(codes)
            for found in in_batches(model, codes, lambda _: room, written):
                questions.update(dict.fromkeys(map(tuple, found)))
                progress(min(len(questions), n), total)
            if len(questions) > ENOUGH * n or len(questions) - before < (1 - ENOUGH) * n:
                break
        prompts = [[*prefix, *question, *ending] for question in questions]
        prompts = rng.sample(prompts, min(n, len(prompts)))
        for found in in_batches(
            model, prompts, lambda _: room, lambda these: answered(model, renderer, these, max_new_tokens)
        ):
            rows += found
            progress(n + len(rows), total)
    progress(total, total)
    return rows


def answered(model: PreTrainedModel, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int) -> list[Row]:
    """Each prompt with the base's greedy answer, as a row without targets."""
    answers = generate(model, renderer, prompts, max_new_tokens=max_new_tokens)
    return [_row(prompt + answer + [renderer.end_of_turn]) for prompt, answer in zip(prompts, answers, strict=True)]


def save_rows(path: Path, rows: list[Row]) -> None:
    """Keep the rows beside the checkpoints, so that a resumed run rehearses the same ones."""
    write_jsonl(path, (row.ids for row in rows))


def load_rows(path: Path, model: PreTrainedModel | None = None) -> list[Row]:
    """The rows that were saved. Raises InputError by `file:line`, also of what is not in the vocabulary of `model`."""
    size = model.config.get_text_config().vocab_size if model else float("inf")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            ids = _IDS.validate_json(line, strict=True) if line else []
            if ids and max(ids) >= size:
                raise ValueError(f"{max(ids)} is not in the model's vocabulary")
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: found no rehearsal row ({reason(error)})",
                f"rm {path}; kdguard tune --resume writes it anew",
            ) from None
        if ids:
            rows.append(_row(ids))
    return rows


def _row(ids: list[int]) -> Row:
    return Row(ids, [IGNORE] * len(ids))
