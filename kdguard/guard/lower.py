"""The layers below the lowest adapter: the same for teacher and student, they run once a batch and need no backward.

The model's own loop still goes over all of its layers, for masks and positions are its business; only what a layer does
when it is called changes. With the upper half adapted and activation checkpointing, a step over P frozen parameters
costs 5P with a live teacher and 4P with a kept one, where plain SFT on all layers costs 6P.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdguard.model.load import layer_stack


class LowerLayers:
    """The lowest `n` of a decoder's `layers`; but for `run` and within `given` the model is as it was."""

    def __init__(self, decoder: nn.Module, layers: nn.ModuleList, n: int) -> None:
        self.decoder, self.n = decoder, n
        self._output: Tensor | tuple = ()  # of the highest of them, as it answers
        self._alone = False
        self._given: Tensor | None = None
        self._in_tuple, self._dtype = False, torch.float32  # as `run` has seen them
        for i, layer in enumerate(layers):
            layer.forward = self._lower(layer.forward, last=i == n - 1) if i < n else self._upper(layer.forward)

    @torch.no_grad()
    def run(self, batch: dict[str, Tensor]) -> Tensor:
        """What they say, (rows, tokens, hidden), without a gradient; no layer above them runs."""
        self._alone = True
        try:
            self.decoder(**batch, use_cache=False)
        finally:
            self._alone, output, self._output = False, self._output, ()
        self._in_tuple = isinstance(output, tuple)
        states = output[0] if self._in_tuple else output
        self._dtype = states.dtype
        return states

    @contextmanager
    def given(self, states: Tensor) -> Iterator[None]:
        """Inside, a forward over the rows of `states` takes them for what these layers say."""
        self._given = states.to(self._dtype)  # beside a teacher's they may have been kept in a wider type
        try:
            yield
        finally:
            self._given = None

    def _lower(self, plain: Callable, *, last: bool) -> Callable:
        @functools.wraps(plain)
        def forward(hidden_states: Tensor, *args, **kwargs):
            if self._given is not None:
                # Where the embeddings were made to need a gradient, reentrant checkpointing counts on it above too.
                states = self._given.detach().requires_grad_(hidden_states.requires_grad)
                return (states, None) if self._in_tuple else states
            output = plain(hidden_states, *args, **kwargs)
            if self._alone and last:
                self._output = output
            return output

        return forward

    def _upper(self, plain: Callable) -> Callable:
        @functools.wraps(plain)
        def forward(*args, **kwargs):
            return self._output if self._alone else plain(*args, **kwargs)

        return forward


def lower_layers(model: PreTrainedModel) -> LowerLayers | None:
    """Those below the lowest adapter in `model`; None where there are none, or where they cannot be shared.

    Some architectures hand more from layer to layer than hidden states. That is not looked up but tried out.
    """
    layers = layer_stack(model)
    if layers is None:
        return None
    depths = {id(part): depth for depth, layer in enumerate(layers) for part in layer.modules()}
    adapted = (
        part
        for part in model.modules()
        if isinstance(part, BaseTunerLayer) or any(weight.requires_grad for weight in part.parameters(recurse=False))
    )
    n = min((depths.get(id(part), 0) for part in adapted), default=0)  # embeddings are below every layer
    if n == 0:
        return None
    lower = LowerLayers(model.get_decoder(), layers, n)
    return lower if _can_be_shared(model, lower) else None


@torch.no_grad()
def _can_be_shared(model: PreTrainedModel, lower: LowerLayers) -> bool:
    """Whether a forward that is given their states ends where a plain one does: twice, and for one row of two.

    The states of the last token are left out, for no other one is to see them.
    """
    ids = torch.arange(16, device=model.device).view(2, 8) % model.config.get_text_config().vocab_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def final(rows: slice = slice(None)) -> Tensor:  # (rows, tokens, hidden)
        part = {key: value[rows] for key, value in batch.items()}
        return lower.decoder(**part, use_cache=False).last_hidden_state.float()

    plain, close = final()[:, :-1], torch.finfo(model.dtype).eps ** 0.5
    try:
        states = lower.run(batch)
        states[:, -1] = 0
        for rows in (slice(None), slice(1, 2), slice(None)):
            with lower.given(states[rows]):
                found = final(rows)[:, :-1]
            if not ((found - plain[rows]).norm(dim=-1) <= close * plain[rows].norm(dim=-1)).all():
                return False
    except Exception:  # whatever the model's own code raises
        return False
    return True
