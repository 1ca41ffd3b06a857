"""Will it fit? Memory of a run, estimated from the network's shape."""

import shutil
import subprocess

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdguard.config import TuneConfig
from kdguard.model.load import load_config

QUANTISED = {"4bit": 4.127 / 8, "8bit": 1.0}  # bytes a weight; NF4 with its constants, themselves quantised


def estimate_gib(model: PreTrainedModel, config: TuneConfig, length: int, packing: int | None = None) -> float:
    """A rough peak, in GiB: base, adapter with its gradients and AdamW's moments, activations and loss chunks.

    length: of the longest row. packing: tokens of a packed micro-batch, or None where rows are padded. Activations
    assume checkpointing: one hidden state a layer, unless they are offloaded, and one layer's worth while it is
    recomputed.
    """
    text = model.config.get_text_config()
    base = _bytes_on_meta(model, config.quant) if model.device.type == "meta" else model.get_memory_footprint()
    linears = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    sizes = [layer.in_features + layer.out_features for layer in linears]
    adapted = 0.5 if config.layers == "upper-half" else 1.0  # share of the layers that are trained
    adapter = adapted * config.rank * sum(sizes)
    rows = config.batch_size if packing else config.micro_batch_size or 4
    tokens = rows * (1 + (config.rehearsal if config.guard else 0)) * length
    if packing:
        tokens = min(tokens, max(packing, length))
    widest = max(sizes, default=4 * text.hidden_size)
    kept = 0 if config.offload else text.num_hidden_layers
    activations = tokens * (text.hidden_size * (kept + 8) + 8 * widest) * 4
    return (base + adapter * 4 * 4 + activations + 5 * 2**25) / 2**30


def shape(config: TuneConfig) -> PreTrainedModel:
    """The network without its weights: no more than the config is read, or fetched."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # as wide as what it computes in
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(config.model, config.revision), dtype=dtype)


def memory() -> tuple[str, float, float]:
    """What a run has to fit into: the GPU's name or, without one, the computer's; free and total GiB.

    The driver's own tool is asked, for torch would take some hundred MB of the GPU to look at it.
    """
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        if done.returncode == 0 and done.stdout.strip():
            name, free, total = done.stdout.splitlines()[0].rsplit(",", 2)
            return f"of {name}", float(free) / 1024, float(total) / 1024
    found = psutil.virtual_memory()
    return "of this computer, which has no NVIDIA GPU", found.available / 2**30, found.total / 2**30


def _bytes_on_meta(model: PreTrainedModel, quant: str) -> float:
    head = model.get_output_embeddings()
    quantised = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head and quant in QUANTISED
    }
    return sum(
        weight.numel() * (QUANTISED[quant] if id(weight) in quantised else weight.itemsize)
        for weight in model.parameters()
    )
