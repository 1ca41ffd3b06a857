"""A language model's output head: the one place where teacher and student meet."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kdguard.errors import InputError


@dataclass(frozen=True)
class Head:
    """A language model's output head: `softcap(scale * (hidden @ weight.T + bias))`.

    weight: (vocabulary, hidden); bias: (vocabulary,) or None. `scale` is Cohere's and Granite's logit scale,
    `softcap` is Gemma 2's `cap * tanh(z / cap)`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def product(self, hidden: Tensor) -> Tensor:
        """(positions, hidden) -> (positions, vocabulary), in the head's own type, before scale and cap."""
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def finish(self, product: Tensor) -> Tensor:
        """Scale and cap a product: logits in at least fp32, whatever the head's own type."""
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """(positions, hidden) -> (positions, vocabulary)."""
        return self.finish(self.product(hidden))

    def unfinish(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of `finish`: with respect to the logits -> with respect to the product."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal language model, with the logit scale or soft cap of its family.

    Sources: `logits_scaling` divides in Granite; `logit_scale` multiplies in Cohere; `final_logit_softcapping` is
    Gemma 2's. `check_head` tells when a family does something else.
    """
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(layer.weight, layer.bias, float(scale), getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise InputError unless `head_of` gives the logits that the model itself gives."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    ours = head_of(model).logits(hidden[0])[None].float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item()):
        raise InputError(
            f"{type(model).__name__}: its output head does more than a matrix product, a scale and a soft cap",
            "use another model, or --no-guard",
        )
