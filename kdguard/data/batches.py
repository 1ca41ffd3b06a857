"""Rows -> the tensors of a batch: padded to one length, or packed one after another."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening

from kdguard.data import IGNORE
from kdguard.data.tokens import Row

UNKEPT = 2**62  # the number of a row that is no longer what it was


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


class _Row(NamedTuple):
    ids: Tensor  # (tokens,), as are the labels
    labels: Tensor
    number: Tensor | None


def pieces(batch: dict[str, Tensor], tokens: int | None = None, longest: int | None = None) -> list[dict[str, Tensor]]:
    """The rows of a batch, padded or packed, in smaller ones: of at most so many tokens with their padding, or one row.

    longest: a longer row keeps its last so many tokens, but never loses its last target, and is UNKEPT in `row_ids`.
    """
    lengths = row_lengths(batch)
    if (tokens is None or batch["input_ids"].numel() <= tokens) and (longest is None or max(lengths) <= longest):
        return [batch]
    padded = "attention_mask" in batch
    found: list[list[_Row]] = []
    for row in _rows(batch, lengths):
        row = row if longest is None or len(row.ids) <= longest else _cut(row, longest)
        together = [*found[-1], row] if found else [row]
        sizes = [len(each.ids) for each in together]
        if found and (tokens is None or (len(sizes) * max(sizes) if padded else sum(sizes)) <= tokens):
            found[-1] = together
        else:
            found.append([row])
    return [_batch(rows, padded) for rows in found]


def row_lengths(batch: dict[str, Tensor]) -> list[int]:
    """Tokens of each row of a batch, padded or packed."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(-1).tolist()
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], batch["position_ids"].shape[1]], strict=True)]


def _rows(batch: dict[str, Tensor], lengths: Sequence[int]) -> Iterator[_Row]:
    numbers = batch.get("row_ids", [None] * len(lengths))
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    ids, labels = (batch[key][mask].split(lengths) for key in ("input_ids", "labels"))
    yield from map(_Row, ids, labels, numbers)


def _cut(row: _Row, longest: int) -> _Row:
    targets = (row.labels != IGNORE).nonzero()[:, 0].tolist()
    end = max(targets[-1] + 1, longest) if targets else len(row.ids)
    number = None if row.number is None else torch.full_like(row.number, UNKEPT)
    return _Row(row.ids[end - longest : end], row.labels[end - longest : end], number)


def _batch(rows: Sequence[_Row], padded: bool) -> dict[str, Tensor]:
    if padded:
        made = {
            "input_ids": pad_sequence([row.ids for row in rows], batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row.ids) for row in rows], batch_first=True),
            "labels": pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORE),
        }
    else:
        made = {
            "input_ids": torch.cat([row.ids for row in rows])[None],
            "labels": torch.cat([row.labels for row in rows])[None],
            "position_ids": torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        }
    if rows[0].number is not None:
        made["row_ids"] = torch.stack([row.number for row in rows])
    return made
