"""The forward pass of a guarded step: the teacher first, adapters off, then the student, then the loss.

All of it runs inside one forward of the wrapped model: DDP and FSDP attach their gradient hooks there, and a call that
went round the wrapper would leave every process training on its own.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from kdguard.data import IGNORE
from kdguard.guard.kept import KeptStates
from kdguard.guard.lean import Lean
from kdguard.guard.loss import guard_loss
from kdguard.guard.lower import LowerLayers
from kdguard.model.head import head_of
from kdguard.model.load import base_view
from kdguard.model.memory import in_batches


@dataclass
class Guard:
    """How the tuned model is held to its teacher; `weight` 0 is plain SFT and runs no teacher.

    weight: λ beside the cross-entropy; it may be changed while training. temperature: τ. masked: take the gold token
    out of the KL at target positions. lesson: the share of the weight that training rows have, beside rehearsal rows'
    1. teacher: the name of the adapter that is the teacher; None is the base.
    """

    weight: float = 12.0
    temperature: float = 1.0
    masked: bool = True
    lesson: float = 0.25
    teacher: str | None = None


@contextmanager
def teacher_view(model: PeftModel, guard: Guard) -> Iterator[None]:
    """Inside, `model` is the guard's teacher and nothing needs a gradient; outside, all is as before."""
    if guard.teacher is None:
        with base_view(model):
            yield
        return
    student = model.active_adapter
    model.set_adapter(guard.teacher)
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_adapter(student)


def take_snapshot(model: PeftModel, name: str) -> None:
    """Copy the adapter as it is now into a frozen one named `name`, to be a guard's teacher."""
    student = model.active_adapter
    weights = get_peft_model_state_dict(model, adapter_name=student)
    model.add_adapter(name, copy.deepcopy(model.peft_config[student]))
    set_peft_model_state_dict(model, weights, adapter_name=name)
    model.set_adapter(student)


def install(
    model: PeftModel,
    guard: Guard,
    kept: KeptStates | None = None,
    lower: LowerLayers | None = None,
    *,
    lean: Lean | None = None,
) -> None:
    """Teach the base inside `model` to answer `model(..., counts=(N, M))` with the guarded loss of the batch.

    The batch's rows are padded, (rows, tokens) with an `attention_mask`, or packed one after another, (1, tokens) with
    `position_ids` that start again at 0 with each row. With `kept`, it names its rows in `row_ids`, and the teacher
    runs only for those it has not met yet. The layers of `lower` run once for teacher and student; what they say is
    kept beside what the teacher says. `lean` says how much of the loss is worked on at once.
    """
    lean = lean or Lean()
    lm = model.get_base_model()
    plain_forward: Callable = lm.forward

    # generate() reads what a forward takes from its signature: it has to go on seeing the model's own.
    @functools.wraps(plain_forward)
    def forward(*args, counts: tuple[Tensor, Tensor] | None = None, row_ids: Tensor | None = None, **inputs):
        if counts is None:
            return plain_forward(*args, **inputs)
        batch, labels = _readable(inputs), inputs["labels"]
        at = guarded_positions(batch)
        rows = _row_numbers(batch)
        row_of = rows[:, :-1][at]  # (positions,)

        def frozen(places: list[int] | None = None) -> Tensor:
            """What the teacher says, and the lower layers beside it: (positions, hidden or 2 * hidden)."""
            part = batch if places is None else _some_rows(batch, rows, places)
            with record_function("teacher"):
                below = lower.run(part) if lower else None
                with teacher_view(model, guard), lower.given(below) if lower else nullcontext():
                    final = _hidden_states(lm, part)
                here = guarded_positions(part)
                return torch.cat([final[here], below[:, :-1][here]], -1) if lower else final[here]

        teacher = below = None  # (positions, hidden), (rows, tokens, hidden)
        if guard.weight > 0:
            if kept is None or row_ids is None:
                teacher = frozen()
            else:
                lengths = row_of.bincount(minlength=len(row_ids)).tolist()
                teacher = kept.states_of(
                    row_ids.tolist(),
                    lambda places: frozen(places).split([lengths[place] for place in places]),
                    labels.device,
                )
            if lower:
                teacher, states = teacher.chunk(2, -1)
                below = states.new_zeros(*rows.shape, states.shape[-1])
                below[:, :-1][at] = states  # no other position is seen from these
        elif lower:
            below = lower.run(batch)
        with lower.given(below) if lower else nullcontext():
            student = _hidden_states(lm, batch)[at]
        with record_function("loss"):
            return guard_loss(
                student,
                teacher,
                labels[:, 1:][at],
                head_of(lm),
                weight=guard.weight,
                temperature=guard.temperature,
                masked=guard.masked,
                shares=torch.where(torch.isin(row_of, rows[labels != IGNORE]), guard.lesson, 1.0),
                n_targets=counts[0],
                n_guarded=counts[1],
                at_once=lean.logits,
            )._asdict()

    lm.forward = forward


def _readable(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder reads of a batch: its ids, and what tells its rows apart."""
    apart = "position_ids" if batch.get("attention_mask") is None else "attention_mask"
    return {key: batch[key] for key in ("input_ids", apart)}


def guarded_positions(batch: dict[str, Tensor]) -> Tensor:
    """(rows, tokens - 1): the positions that predict a token of their own row, which is not padding."""
    next_token = batch["attention_mask" if "attention_mask" in batch else "position_ids"][:, 1:]
    return next_token != 0  # 0 is padding in a mask, and where another row begins in positions


def _row_numbers(batch: dict[str, Tensor]) -> Tensor:
    """(rows, tokens): which row of the batch a token belongs to, from 0 on."""
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        return torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    return (batch["position_ids"] == 0).cumsum(-1) - 1


def _some_rows(batch: dict[str, Tensor], rows: Tensor, places: list[int]) -> dict[str, Tensor]:
    """A batch of the rows at `places`, which ascend."""
    chosen = torch.isin(rows, torch.tensor(places, device=rows.device))
    lines = len(places) if "attention_mask" in batch else 1
    return {key: value[chosen].view(lines, -1) for key, value in batch.items()}


def _hidden_states(lm: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Final hidden states of the positions that predict a next token: (rows, tokens - 1, hidden)."""
    return lm.get_decoder()(**batch, use_cache=False).last_hidden_state[:, :-1]


def count(batch: dict[str, Tensor]) -> Tensor:
    """(N, M) of one micro-batch: its target positions and its guarded positions."""
    at = guarded_positions(batch)
    return torch.stack([(batch["labels"][:, 1:][at] != IGNORE).sum(), at.sum()])


@torch.no_grad()
def drift(model: PeftModel, rows: Sequence[Any], collate: Callable[[Sequence[Any]], dict[str, Tensor]]) -> float:
    """Mean KL(base || tuned) per token, in nats, over rows that the base wrote."""
    lm = model.get_base_model()

    def held_apart(batch: list[Any]) -> tuple[float, int]:
        inputs = {key: value.to(lm.device) for key, value in _readable(collate(batch)).items()}
        at = guarded_positions(inputs)
        with base_view(model):
            teacher = _hidden_states(lm, inputs)[at]
        student = _hidden_states(lm, inputs)[at]
        unlabelled = torch.full((len(student),), IGNORE, device=lm.device)
        return guard_loss(student, teacher, unlabelled, head_of(lm)).kl.item() * len(student), len(student)

    totals, tokens = zip(*in_batches(lm, rows, lambda row: len(row.ids), held_apart, most=16), strict=True)
    return sum(totals) / sum(tokens)
