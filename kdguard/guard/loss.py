"""The guarded loss: cross-entropy on the targets and KL to the teacher, a chunk of positions at a time.

Teacher and student share one frozen output head. So the gradient with respect to the student's hidden states is known
in closed form as soon as a chunk's logits are, and is computed in the forward pass: two vocabulary-sized products a
position for the logits and one for the gradient, no gradient of the head, and never a (positions, vocabulary) tensor.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdguard.data import IGNORE
from kdguard.model.head import Head

LOGITS = 2**25  # of one product: 64 MiB in bf16
# Positions of one product, and logits worked on at once in fp32: enough for a GPU to be worth the call, few enough for
# a processor's caches.
CHUNK = {"cpu": 256}
PIECE = {"cpu": 2**18}


class GuardLoss(NamedTuple):
    """`loss` = `ce` + weight * temperature**2 * `kl`, all scalars in nats; only `loss` carries a gradient."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


def guard_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    head: Head,
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    masked: bool = True,
    shares: Tensor | None = None,
    n_targets: Tensor | float | None = None,
    n_guarded: Tensor | float | None = None,
    chunk: int | None = None,
    at_once: int = LOGITS,
) -> GuardLoss:
    """Cross-entropy on the target positions plus the weighted forward KL(teacher || student) on all positions.

    L = (1/N) sum_targets CE + weight * temperature**2 * (1/M) sum_positions share * KL(p_teacher || p_student)

    The KL is Hinton-style distillation at `temperature` as in arXiv 2604.15574; `masked` removes the gold token of a
    target position from both distributions and renormalises them first, so that the guard does not fight the lesson
    (arXiv 2605.29498).

    student, teacher: final hidden states, (positions, hidden), each position predicting a next token. `teacher` None
        is plain SFT.
    head: the output head that both share; `head_of(model)`.
    labels: (positions,), already shifted: the token that the position is to predict, or -100 where it has no target.
    shares: (positions,), how much of `weight` each position has; 1 by default.
    n_targets, n_guarded: N and M. Give the counts over the whole optimiser step, all micro-batches and processes, and
        splitting a batch never changes the gradient; by default they are counted here.
    chunk: positions at a time; by default as many as have `at_once` logits, 64 MiB in bf16, and on a CPU at most 256.

    Raises ValueError when student and teacher differ in shape.
    """
    if teacher is None:
        at = labels != IGNORE
        student, labels = student[at], labels[at]
    elif teacher.shape != student.shape:
        raise ValueError(f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)} differ in shape")
    n_targets = (labels != IGNORE).sum() if n_targets is None else n_targets
    n_guarded = len(labels) if n_guarded is None else n_guarded
    if chunk is None:
        most = min(CHUNK.get(student.device.type, len(student)), at_once // len(head.weight))
        chunks = math.ceil(len(student) / max(1, most))
        chunk = max(1, math.ceil(len(student) / max(1, chunks)))  # all of one size
    piece = max(1, min(PIECE.get(student.device.type, at_once), at_once // 8) // len(head.weight))  # positions
    return GuardLoss(
        *_SharedHeadLoss.apply(
            student, teacher, labels, head, weight, temperature, masked, shares, n_targets, n_guarded, chunk, piece
        )
    )


class _SharedHeadLoss(torch.autograd.Function):
    """Computes the gradient in forward, chunk by chunk, and hands it over in backward."""

    @staticmethod
    def forward(
        ctx, student, teacher, labels, head, weight, temperature, masked, shares, n_targets, n_guarded, chunk, piece
    ):
        wide = torch.promote_types(student.dtype, torch.float32)
        ce = torch.zeros((), dtype=wide, device=student.device)
        kl = torch.zeros((), dtype=wide, device=student.device)
        n_targets = torch.as_tensor(n_targets, dtype=wide, device=student.device).clamp(min=1)
        n_guarded = torch.as_tensor(n_guarded, dtype=wide, device=student.device).clamp(min=1)
        shares = torch.ones_like(labels, dtype=wide) if shares is None else shares.to(wide)
        grad = torch.empty_like(student, dtype=wide) if student.requires_grad else None
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            product = head.product(student[rows])  # (chunk, vocabulary); its gradient takes its place, piece by piece
            teacher_product = None if teacher is None else head.product(teacher[rows])
            for first in range(0, len(product), piece):
                here = slice(first, first + piece)
                wanted = labels[rows][here]
                logits = head.finish(product[here])
                # The product below runs in the head's type: scaled so that 16-bit gradients do not underflow.
                for_ce = (wanted != IGNORE)[:, None] * (n_guarded / n_targets)
                if teacher_product is None:
                    terms = _cross_entropy(logits, wanted, for_ce)
                else:
                    share = shares[rows][here]
                    for_kl = weight * temperature**2 * share[:, None]
                    teacher_logits = head.finish(teacher_product[here])
                    terms = _guarded(logits, teacher_logits, wanted, masked, temperature, for_ce, for_kl)
                    kl += (terms.kl * share).sum()
                ce += terms.ce.sum()
                product[here] = head.unfinish(terms.grad, logits)
            if grad is not None:
                grad[rows] = (product @ head.weight).to(wide) / n_guarded
            del product, teacher_product  # before the next ones are made
        ce, kl = ce / n_targets, kl / n_guarded
        ctx.save_for_backward(grad)
        ctx.dtype = student.dtype
        ctx.mark_non_differentiable(ce, kl)
        return ce + weight * temperature**2 * kl, ce, kl

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        # Scaled before it is rounded: a loss scale is there to keep 16-bit gradients from underflowing.
        return ((grad * grad_loss).to(ctx.dtype), *(None,) * 11)


class _Terms(NamedTuple):
    """Of a piece of the positions."""

    ce: Tensor  # (positions,), 0 where there is no target
    kl: Tensor | None  # (positions,)
    grad: Tensor  # of for_ce * ce + for_kl * kl with respect to the student's logits, (positions, vocabulary)


def _cross_entropy(logits: Tensor, labels: Tensor, for_ce: Tensor) -> _Terms:
    gold = labels.clamp(min=0)[:, None]
    log_q = F.log_softmax(logits, dim=-1)
    ce = -(log_q.gather(1, gold)[:, 0] * (labels != IGNORE))
    return _Terms(ce, None, log_q.exp_().mul_(for_ce).scatter_add_(1, gold, -for_ce))


def _guarded(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    masked: bool,
    temperature: float,
    for_ce: Tensor,
    for_kl: Tensor,
) -> _Terms:
    """Cross-entropy, and forward KL(teacher || student) at `temperature`; masked: gold tokens taken out of both first.

    for_ce, for_kl: (positions, 1), what the gradient of either is multiplied by.
    """
    gold, target = labels.clamp(min=0)[:, None], labels[:, None] != IGNORE
    student = logits / temperature if temperature != 1.0 else logits
    teacher = teacher / temperature if temperature != 1.0 else teacher
    if masked:
        # Finite, so that the difference of the two logs is a number; its probability is exactly 0.
        lowest = torch.finfo(student.dtype).min / 4
        student, teacher = (
            z.scatter(1, gold, torch.where(target, lowest, z.gather(1, gold))) for z in (student, teacher)
        )
    log_p = F.log_softmax(teacher, dim=-1)
    log_q = F.log_softmax(student, dim=-1)
    p = log_p.exp()
    kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
    if temperature != 1.0:
        grad = log_q.exp_().sub_(p).mul_(for_kl / temperature)
        cross = _cross_entropy(logits, labels, for_ce)
        return _Terms(cross.ce, kl, grad.add_(cross.grad))
    # The softmax without the gold token says all that the cross-entropy needs: its normaliser is seen at any other one.
    other = (gold + 1) % logits.shape[1]
    gap = logits.gather(1, other) - log_q.gather(1, other) - logits.gather(1, gold)
    ce, left = (F.softplus(gap), gap.sigmoid()) if masked else (gap, torch.ones_like(gap))
    for_ce = for_ce * left  # `left` is the probability of all but the gold token
    grad = log_q.exp_().mul_(for_ce + for_kl).addcmul_(p, for_kl, value=-1).scatter_add_(1, gold, -for_ce)
    return _Terms((ce * target)[:, 0], kl, grad)
