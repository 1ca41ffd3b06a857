"""Rehearsal rows: conversations that the base writes itself, questions and answers, from an empty user's turn.

Sources: self-synthesized rehearsal (arXiv 2403.01244); sampling an instruct model from the template's empty user turn
(Magpie, arXiv 2406.08464).
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kdguard.data import IGNORE
from kdguard.data.tokens import Renderer, Row
from kdguard.files import write_whole
from kdguard.probes.answer import batch_rows, generate


def rehearse(
    model: PreTrainedModel,
    renderer: Renderer,
    n: int,
    *,
    seed: int,
    max_new_tokens: int = 128,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Sample `n` rows without targets at temperature 1 from `model`, the base.

    max_new_tokens: the longest question and the longest answer.
    """
    prefix = renderer.user_prefix()
    ending = renderer.after_user_turn()
    batch_size = batch_rows(model, len(prefix) + len(ending) + 2 * max_new_tokens)
    progress(0, n)
    rows: list[Row] = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(rows) < n:
            size = min(batch_size, n - len(rows))
            questions = generate(
                model,
                renderer,
                [prefix] * size,
                max_new_tokens=max_new_tokens,
                sample=True,
                stop=[token for token in ending if token in renderer.control][:1],
            )
            prompts = [prefix + question + ending for question in questions]
            answers = generate(model, renderer, prompts, max_new_tokens=max_new_tokens, sample=True)
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
