"""Rows -> the tensors of a batch: padded to one length, or packed one after another."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from kdguard.data import IGNORE
from kdguard.data.tokens import Row


class Collator:
    """Rows -> a right-padded batch: `input_ids`, `attention_mask` and `labels`, each (rows, tokens)."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in rows)

        def stack(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([value + [fill] * (width - len(value)) for value in values])

        return {
            "input_ids": stack([row.ids for row in rows], self.pad),
            "attention_mask": stack([[1] * len(row.ids) for row in rows], 0),
            "labels": stack([row.labels for row in rows], IGNORE),
        }


def pack(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows -> one packed batch: `input_ids`, `labels` and `position_ids`, which start again at 0, each (1, tokens).

    It has no attention mask: only without one does transformers tell rows apart by their positions and let none attend
    to another.
    """
    features = [{"input_ids": row.ids, "labels": row.labels} for row in rows]
    return DataCollatorWithFlattening()(features, return_tensors="pt")
