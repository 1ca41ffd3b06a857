"""Rehearsal rows: conversations that the base writes itself, questions and answers, from an empty user's turn.

What is never rehearsed is what is forgotten, so the questions are spread over all that the base may ask (arithmetic
sampling): at the same number of rows fewer of its facts are left out than by independent sampling.

Sources: self-synthesized rehearsal (arXiv 2403.01244); sampling an instruct model from the template's empty user turn
(Magpie, arXiv 2406.08464); arithmetic sampling (arXiv 2210.15458).
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kdguard.data import IGNORE
from kdguard.data.tokens import Renderer, Row
from kdguard.files import write_whole
from kdguard.probes.answer import batch_rows, generate

REHEARSAL = "rehearsal.jsonl"  # beside the checkpoints


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
    """Sample `n` rows without targets at temperature 1 from `model`, the base, in random order.

    spread: questions by evenly spaced codes; else independent of each other. max_new_tokens: the longest question and
    the longest answer.
    """
    prefix, ending = renderer.user_prefix(), renderer.after_user_turn()
    batch_size = batch_rows(model, len(prefix) + len(ending) + 2 * max_new_tokens)
    stop = [token for token in ending if token in renderer.control][:1]
    rng = random.Random(seed)
    codes = [(i + rng.random()) / n if spread else rng.random() for i in range(n)]
    rng.shuffle(codes)
    progress(0, n)
    rows: list[Row] = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(rows) < n:
            these = codes[len(rows) : len(rows) + batch_size]
            questions = generate(
                model, renderer, [prefix] * len(these), max_new_tokens=max_new_tokens, codes=these, stop=stop
            )
            prompts = [prefix + question + ending for question in questions]
            free = [rng.random() for _ in prompts]
            answers = generate(model, renderer, prompts, max_new_tokens=max_new_tokens, codes=free)
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = prompt + answer + [renderer.end_of_turn]
                rows.append(Row(ids, [IGNORE] * len(ids)))
            progress(len(rows), n)
    return rows


def save_rows(path: Path, rows: list[Row]) -> None:
    """Keep the rows beside the checkpoints, so that a resumed run rehearses the same ones."""
    write_whole(path, "".join(json.dumps(row.ids) + "\n" for row in rows))


def load_rows(path: Path) -> list[Row]:
    ids = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Row(row, [IGNORE] * len(row)) for row in ids]
