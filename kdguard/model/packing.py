"""Does a model keep packed rows apart? Asked of the model itself: what carries a state along may not start it anew."""

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kdguard.data.batches import pack
from kdguard.data.tokens import Row

CHECKED = 64  # tokens of a row, at most


@torch.no_grad()
def keeps_rows_apart(model: PreTrainedModel, rows: Sequence[Row]) -> bool:
    """Whether the final hidden states of `rows`, packed, are those of each alone, but for rounding."""
    decoder = model.get_decoder()
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return False
    rows = [Row(row.ids[:CHECKED], row.labels[:CHECKED]) for row in rows]

    def states(rows: Sequence[Row]) -> torch.Tensor:  # (tokens, hidden)
        batch = {key: value.to(model.device) for key, value in pack(rows).items() if key != "labels"}
        return decoder(**batch, use_cache=False).last_hidden_state[0]

    apart = torch.cat([states([row]) for row in rows])
    off = (states(rows) - apart).float().norm(dim=-1) / apart.float().norm(dim=-1)
    return bool(off.max() < torch.finfo(model.dtype).eps ** 0.5)
