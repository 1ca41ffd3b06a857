"""Will it fit? Memory of a run, estimated from the network's shape."""

import torch
from transformers import PreTrainedModel

from kdguard.config import TuneConfig


def estimate_gib(model: PreTrainedModel, config: TuneConfig, length: int, packing: int | None = None) -> float:
    """A rough peak, in GiB: base, adapter with its gradients and AdamW's moments, activations and loss chunks.

    length: of the longest row. packing: tokens of a packed micro-batch, or None where rows are padded. Activations
    assume checkpointing: one hidden state a layer, and one layer's worth while it is recomputed.
    """
    text = model.config.get_text_config()
    base = model.get_memory_footprint()
    linears = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    sizes = [layer.in_features + layer.out_features for layer in linears]
    adapter = config.rank * sum(sizes)
    rows = config.batch_size if packing else config.micro_batch_size or 4
    tokens = rows * (1 + (config.rehearsal if config.guard else 0)) * length
    if packing:
        tokens = min(tokens, max(packing, length))
    widest = max(sizes, default=4 * text.hidden_size)
    activations = tokens * (text.hidden_size * (text.num_hidden_layers + 8) + 8 * widest) * 4
    return (base + adapter * 4 * 4 + activations + 5 * 2**25) / 2**30
