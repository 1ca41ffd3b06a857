"""Rows packed one after another: no padding, and one long row in place of many short ones."""

from collections.abc import Sequence

from torch import Tensor
from transformers import DataCollatorWithFlattening

from kdguard.data.tokens import Row


def pack(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows -> one packed batch: `input_ids`, `labels` and `position_ids`, which start again at 0, each (1, tokens).

    It has no attention mask: only without one does transformers tell rows apart by their positions and let none attend
    to another.
    """
    features = [{"input_ids": row.ids, "labels": row.labels} for row in rows]
    return DataCollatorWithFlattening()(features, return_tensors="pt")
