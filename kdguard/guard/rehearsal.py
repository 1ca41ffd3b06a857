"""Rehearsal rows: conversations that the base writes itself, questions and answers.

Free ones start from an empty user's turn; near ones from a training question cut at a random token, so that they ask
about the neighbours of what is taught. Those are where new facts interfere with old ones (arXiv 2604.15574).

Sources: self-synthesized rehearsal (arXiv 2403.01244); sampling an instruct model from the template's empty user turn
(Magpie, arXiv 2406.08464).
"""

import json
import random
from collections.abc import Callable, Sequence
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
    near: Sequence[Row] = (),
    near_share: float = 0.0,
    max_new_tokens: int = 128,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Sample `n` rows without targets at temperature 1 from `model`, the base, in no order.

    near, near_share: the training rows, and the share of rows that start near one of them. A row that arrives at a
        training question itself is thrown away: there the guard would fight the lesson.
    max_new_tokens: the longest question and the longest answer.
    """
    free, ending = renderer.user_prefix(), renderer.after_user_turn()
    prompts = [row.ids[: next(i for i, label in enumerate(row.labels) if label != IGNORE)] for row in near]
    taught = {tuple(prompt) for prompt in prompts}
    longest = max([len(free), *map(len, prompts)]) + len(ending) + 2 * max_new_tokens
    batch_size = batch_rows(model, longest)
    stop = [token for token in ending if token in renderer.control][:1]
    rng = random.Random(seed)

    def start() -> list[int]:
        if not prompts or rng.random() >= near_share:
            return free
        prompt = rng.choice(prompts)
        return prompt[: rng.randrange(len(free), max(len(free), len(prompt) - len(ending)) + 1)]

    codes = [(i + rng.random()) / n for i in range(n)]
    rng.shuffle(codes)

    progress(0, n)
    rows: list[Row] = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(rows) < n:
            starts = [start() for _ in range(min(batch_size, n - len(rows)))]
            these = [codes.pop() if codes else rng.random() for _ in starts]
            written = generate(model, renderer, starts, max_new_tokens=max_new_tokens, codes=these, stop=stop)
            asked = [begun + rest + ending for begun, rest in zip(starts, written, strict=True)]
            asked = [prompt for prompt in asked if tuple(prompt) not in taught]
            these = [rng.random() for _ in asked]
            answers = generate(model, renderer, asked, max_new_tokens=max_new_tokens, codes=these) if asked else []
            for prompt, answer in zip(asked, answers, strict=True):
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
