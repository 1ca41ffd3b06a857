"""The loss is the product: its value and gradient are held to an unchunked reference in double precision."""

import pytest
import torch
import torch.nn.functional as F

from kdguard.data import IGNORE
from kdguard.guard.loss import guard_loss
from kdguard.model.head import Head

POSITIONS, HIDDEN, VOCABULARY = 53, 32, 301


def inputs(dtype=torch.float32, **head):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(POSITIONS, HIDDEN, generator=generator)
    teacher = student + 0.3 * torch.randn(POSITIONS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    labels[::3] = IGNORE
    head = Head(weight.to(dtype), bias.to(dtype), **head)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels, head


def reference(student, teacher, labels, head, weight, temperature, masked, shares=1.0):
    """The equation as it is written in METHOD, with every logit at once."""
    z, t = head.logits(student), head.logits(teacher)
    ce = F.cross_entropy(z, labels, ignore_index=IGNORE)
    z, t = z / temperature, t / temperature
    if masked:
        gold = torch.zeros_like(z, dtype=torch.bool)
        at = labels != IGNORE
        gold[at, labels[at]] = True
        z, t = z.masked_fill(gold, -1e9), t.masked_fill(gold, -1e9)
    kl = F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    kl = (kl * shares).sum() / len(z)
    return ce + weight * temperature**2 * kl, ce, kl


@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize("temperature", (1.0, 0.5, 2.0))
@pytest.mark.parametrize("head", ({}, {"softcap": 30.0}, {"scale": 0.25}, {"scale": 3.0, "softcap": 50.0}))
def test_value_and_gradient_equal_the_double_precision_reference(masked, temperature, head):
    """In chunks of 7 positions, worked on three at a time, neither of which divides the positions."""
    student, teacher, labels, ours = inputs(**head)
    how = {"weight": 3.0, "temperature": temperature, "masked": masked}
    out = guard_loss(student, teacher, labels, ours, **how, chunk=7, at_once=8 * 3 * VOCABULARY)
    out.loss.backward()
    exact, exact_teacher, labels, theirs = inputs(torch.float64, **head)
    loss, ce, kl = reference(exact, exact_teacher, labels, theirs, 3.0, temperature, masked)
    loss.backward()
    for ours, theirs in ((out.loss, loss), (out.ce, ce), (out.kl, kl)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    error = (student.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-5


def test_each_position_has_its_share_of_the_weight():
    """Training rows are guarded less than rehearsal rows, in one batch."""
    student, teacher, labels, head = inputs()
    shares = torch.where(torch.arange(POSITIONS) % 2 == 0, 0.25, 1.0)
    out = guard_loss(student, teacher, labels, head, weight=3.0, shares=shares, chunk=7)
    out.loss.backward()
    exact, exact_teacher, labels, exact_head = inputs(torch.float64)
    loss, _, kl = reference(exact, exact_teacher, labels, exact_head, 3.0, 1.0, True, shares.double())
    loss.backward()
    torch.testing.assert_close(out.kl.double(), kl, rtol=1e-5, atol=0)
    assert (student.grad.double() - exact.grad).norm() / exact.grad.norm() < 1e-5


@pytest.mark.parametrize("masked", (True, False))
def test_equal_states_have_no_divergence_at_all(masked):
    """A KL without the teacher's entropy is not 0 here, and then nobody can read the curve."""
    student, _, labels, head = inputs()
    assert guard_loss(student, student.detach(), labels, head, masked=masked).kl.item() == 0.0


def test_without_a_teacher_it_is_cross_entropy():
    student, _, labels, head = inputs()
    guard_loss(student, None, labels, head).loss.backward()
    exact, _, _, exact_head = inputs(torch.float64)
    F.cross_entropy(exact_head.logits(exact), labels, ignore_index=IGNORE).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_the_masked_guard_does_not_pull_the_gold_token_back():
    """At a target position, learning the gold token alone costs the masked guard nothing, the plain one a lot."""
    weight = torch.eye(8)
    teacher = torch.zeros(1, 8)
    student = torch.zeros(1, 8)
    student[0, 3] = 12.0
    labels = torch.tensor([3])
    masked = guard_loss(student, teacher, labels, Head(weight), masked=True).kl
    plain = guard_loss(student, teacher, labels, Head(weight), masked=False).kl
    assert masked.item() == pytest.approx(0.0, abs=1e-6)
    assert plain.item() > 5


@pytest.mark.parametrize("sizes", ((53,), (1, 52), (20, 3, 30), (10, 10, 10, 10, 13)))
def test_uneven_micro_batches_add_up_to_the_batch(sizes):
    """N and M are those of the whole step; a mean per micro-batch would weigh rows by their neighbours."""
    student, teacher, labels, head = inputs(torch.float64)
    whole = guard_loss(student, teacher, labels, head, weight=3.0)
    whole.loss.backward()
    expected, student.grad = student.grad, None
    total, start = 0.0, 0
    for size in sizes:
        rows = slice(start, start + size)
        part = guard_loss(
            student[rows],
            teacher[rows],
            labels[rows],
            head,
            weight=3.0,
            n_targets=(labels != IGNORE).sum(),
            n_guarded=POSITIONS,
        )
        part.loss.backward()
        total, start = total + part.loss.item(), start + size
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-15)


def test_a_batch_without_targets_is_guarded_only():
    student, teacher, labels, head = inputs()
    out = guard_loss(student, teacher, torch.full_like(labels, IGNORE), head, weight=2.0)
    assert out.ce.item() == 0
    assert out.loss.item() == pytest.approx(2 * out.kl.item())


def test_a_loss_scale_reaches_sixteen_bit_gradients():
    """fp16 training multiplies the loss by 65,536: rounded first, the guard's gradient would be 0, or infinite."""
    student, teacher, labels, head = inputs(torch.float16)
    loss = guard_loss(student, teacher, labels, head, n_targets=20_000, n_guarded=20_000).loss
    (loss * 65536.0).backward()
    assert student.grad.isfinite().all()
    assert (student.grad != 0).float().mean() > 0.99


def test_sixteen_bit_states_give_sixteen_bit_gradients_that_did_not_underflow():
    student, teacher, labels, head = inputs(torch.bfloat16)
    guard_loss(student, teacher, labels, head, n_targets=1e6, n_guarded=1e7).loss.backward()
    exact, exact_teacher, _, exact_head = inputs(torch.float64)
    guard_loss(exact, exact_teacher, labels, exact_head, n_targets=1e6, n_guarded=1e7).loss.backward()
    assert student.grad.dtype == torch.bfloat16
    cosine = F.cosine_similarity(student.grad.double().flatten(), exact.grad.flatten(), dim=0)
    assert cosine > 0.99
