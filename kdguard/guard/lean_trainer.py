"""`LeanTrainer`: a trainer that goes on when memory runs out, with the same steps in smaller pieces."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback

from kdguard.data.batches import pieces, row_lengths
from kdguard.errors import OutOfMemory
from kdguard.guard.checkpoint import SafeTrainer
from kdguard.guard.lean import CHECKPOINTING, Lean
from kdguard.guard.teacher import count
from kdguard.model.memory import forget, ran_out

T = TypeVar("T")


@dataclass
class _Step:
    """An optimiser step that is under way.

    counts: its (N, M). parts: CE and KL as they stood before it. begun: of its micro-batches. loss: what was returned
    for them. piece: what is in the model.
    """

    micro_batches: Sequence[dict[str, torch.Tensor]]
    counts: torch.Tensor
    parts: torch.Tensor
    begun: int = 0
    loss: torch.Tensor | float = 0.0
    piece: dict[str, torch.Tensor] = field(default_factory=dict)


class LeanTrainer(SafeTrainer):
    """What of `GuardedTrainer` deals with memory; its arguments stand there.

    The loss of a micro-batch is divided by counts of the whole optimiser step, so a step that is begun anew in smaller
    pieces has the same gradient. Where memory runs out in the first step of the optimiser, which makes its state then,
    the weights are put back and the step is taken again. In a later one it ends the run, for nobody can tell which
    weights have moved: it goes on from its last checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        lean: Lean | None = None,
        shorten: bool = False,
        on_step_down: Callable[..., None] = lambda what, step: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lean, self.shorten, self.on_step_down = lean or Lean(), shorten, on_step_down
        self.lean.checkpointing |= self.lean.offload or self.args.activation_checkpointing
        self._parts = torch.zeros(2, dtype=torch.float64)  # CE and KL summed since they were last logged
        self._steps = 0  # optimiser steps in them
        self.add_callback(_Beginning(self))

    @property
    def _sharded(self) -> bool:
        """Where weights are sharded a layer's forward is collective: no process may leave it out."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """(N, M) over the whole optimiser step, or a batch of evaluation: every micro-batch and every process."""
        return self._count(batch_samples)

    def get_batch_samples(self, *args: Any) -> tuple[list, torch.Tensor]:
        micro_batches, counts = super().get_batch_samples(*args)
        self._steps += 1
        self._step = _Step(micro_batches, counts, self._parts.clone())
        return micro_batches, counts

    def _count(self, micro_batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        cut = (piece for batch in micro_batches for piece in pieces(batch, longest=self.lean.longest))
        counts = sum(map(count, cut)).to(self.args.device)
        return self.accelerator.gather(counts[None]).sum(0)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch, in the pieces that fit. Where memory runs out, the step is begun anew a rung further down.

        Returns what is missing from the losses that were returned for this step so far.
        """
        step = self._step
        step.begun += 1
        rest, returned, loss = [inputs], 0.0, None
        while loss is None:
            try:
                loss = sum(self._losses(model, rest))
            except Exception as error:
                if not ran_out(error):
                    raise
                if self.accelerator.num_processes > 1 or self._sharded:
                    raise OutOfMemory(
                        f"memory ran out in process {self.args.process_index}, and one alone cannot take less of it",
                        "a smaller --micro-batch-size or --max-length, or --offload",
                    ) from error
                forget(error)
                model.zero_grad()
                self._parts.copy_(step.parts)
                self._step_down()
                step.counts, rest = self._count(step.micro_batches), step.micro_batches[: step.begun]
                returned, step.loss = returned + step.loss, 0.0
        step.loss = step.loss + loss
        return loss - returned

    def _losses(self, model: torch.nn.Module, micro_batches: Sequence[dict[str, torch.Tensor]]) -> Iterator[Any]:
        for batch in micro_batches:
            for piece in pieces(batch, self.lean.tokens, self.lean.longest):
                self._step.piece = piece
                yield super().training_step(model, piece, self._step.counts)

    def _step_down(self) -> None:
        """Take a rung, or save a checkpoint of the last whole step and raise OutOfMemory."""
        base, piece = self.model.get_base_model(), self._step.piece
        lengths, tokens = row_lengths(piece), piece["input_ids"].numel()
        said = self.lean.step_down(
            lengths,
            tokens,
            base.get_output_embeddings().weight.shape[0],
            can_checkpoint=base.supports_gradient_checkpointing,
            shorten=self.shorten,
        )
        if said is None:
            self.save_last_step()
            raise OutOfMemory(
                f"memory ran out in step {self.state.global_step + 1:,} with a single row of {tokens:,} tokens"
                + (f", after {', '.join(self.lean.done)}" if self.lean.done else ""),
                "a smaller --max-length, --rank or model: kdguard presets",
            )
        self._switch_checkpointing()
        self.on_step_down(said, step=self.state.global_step + 1)

    def _switch_checkpointing(self) -> None:
        if self.lean.offload or (self.lean.checkpointing and not self.args.activation_checkpointing):
            offload = self.lean.offload and torch.accelerator.is_available()  # without one they are there already
            self.model.get_base_model().activation_checkpointing_enable(CHECKPOINTING, offload=offload)

    def _once_more(self, where: str, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """`work`; where memory runs out in it, `undo` and `work` again."""
        try:
            return work()
        except Exception as error:
            if not ran_out(error):
                raise
            forget(error)
        undo()
        self.on_step_down(f"{where} once more, with what was held back freed", step=self.state.global_step + 1)
        return work()

    def _clip_grad_norm(self, model):
        clip = functools.partial(super()._clip_grad_norm, model)
        # The gradients of fp16 can be unscaled only once.
        return clip() if self.args.fp16 else self._once_more("the clipping of the gradients", clip)


class _Beginning(TrainerCallback):
    """Once the Trainer has made everything ready: checkpoints as `Lean` has them, and an optimiser's step with care."""

    def __init__(self, trainer: LeanTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.trainer._switch_checkpointing()
        if self.trainer.is_deepspeed_enabled:
            return  # its optimiser has stepped within backward
        step = optimizer.step

        @functools.wraps(step)  # a scheduler looks for its mark on it
        def careful() -> None:
            try:
                return step() if optimizer.state else self._first(optimizer, step)
            except Exception as error:
                if not ran_out(error):
                    raise
                raise OutOfMemory(
                    f"memory ran out in the optimiser, in step {state.global_step + 1:,}", "a smaller --rank"
                ) from None

        optimizer.step = careful

    def _first(self, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        before = [weight.detach().to("cpu", copy=True) for weight in weights]

        def undo() -> None:
            optimizer.state.clear()
            for weight, was in zip(weights, before, strict=True):
                weight.data.copy_(was)

        self.trainer._once_more("the optimiser's first step", step, undo)
