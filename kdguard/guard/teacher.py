"""The forward pass of a guarded step: the teacher first, adapters off, then the student, then the loss.

All of it runs inside one forward of the wrapped model: DDP and FSDP attach their gradient hooks there, and a call that
went round the wrapper would leave every process training on its own.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from kdguard.data import IGNORE
from kdguard.guard.loss import GuardLoss, guard_loss
from kdguard.model.head import head_of
from kdguard.model.load import base_view


@dataclass(frozen=True)
class Guard:
    """How the tuned model is held to its teacher; `weight` 0 is plain SFT and runs no teacher.

    weight: λ beside the cross-entropy. temperature: τ. masked: take the gold token out of the KL at target positions.
    """

    weight: float = 3.0
    temperature: float = 1.0
    masked: bool = True


def install(model: PeftModel, guard: Guard) -> None:
    """Teach the base inside `model` to answer `model(..., counts=(N, M))` with the guarded loss of the batch."""
    lm = model.get_base_model()
    plain_forward: Callable = lm.forward

    # generate() reads what a forward takes from its signature: it has to go on seeing the model's own.
    @functools.wraps(plain_forward)
    def forward(*args, counts: tuple[Tensor, Tensor] | None = None, **inputs):
        if counts is None:
            return plain_forward(*args, **inputs)
        return _loss(model, guard, counts, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])._asdict()

    lm.forward = forward


def guarded_positions(attention_mask: Tensor) -> Tensor:
    """(rows, tokens) -> (rows, tokens - 1): the positions that predict a token that is not padding."""
    return attention_mask[:, 1:].bool()


def _loss(
    model: PeftModel, guard: Guard, counts: tuple[Tensor, Tensor], ids: Tensor, mask: Tensor, labels: Tensor
) -> GuardLoss:
    lm = model.get_base_model()
    at = guarded_positions(mask)
    teacher = None
    if guard.weight > 0:
        with base_view(model):
            teacher = _hidden_states(lm, ids, mask)[at]  # (positions, hidden)
    return guard_loss(
        _hidden_states(lm, ids, mask)[at],
        teacher,
        labels[:, 1:][at],
        head_of(lm),
        weight=guard.weight,
        temperature=guard.temperature,
        masked=guard.masked,
        n_targets=counts[0],
        n_guarded=counts[1],
    )


def _hidden_states(lm: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states of the positions that predict a next token: (rows, tokens - 1, hidden)."""
    return lm.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]


def count(batch: dict[str, Tensor]) -> Tensor:
    """(N, M) of one micro-batch: its target positions and its guarded positions."""
    return torch.stack([(batch["labels"][:, 1:] != IGNORE).sum(), guarded_positions(batch["attention_mask"]).sum()])


@torch.no_grad()
def drift(model: PeftModel, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean KL(base || tuned) per token, in nats, over batches of text that the base wrote."""
    lm = model.get_base_model()
    total, tokens = 0.0, 0
    for batch in batches:
        ids, mask = batch["input_ids"].to(lm.device), batch["attention_mask"].to(lm.device)
        at = guarded_positions(mask)
        with base_view(model):
            teacher = _hidden_states(lm, ids, mask)[at]
        student = _hidden_states(lm, ids, mask)[at]
        unlabelled = torch.full((len(student),), IGNORE, device=lm.device)
        total += guard_loss(student, teacher, unlabelled, head_of(lm)).kl.item() * len(student)
        tokens += len(student)
    return total / tokens
