"""A network without its weights: the real modules, quantised, on tensors that have shapes and types but no data.

What runs on it under `FakeTensorMode` takes no memory, hardly any time, and allocates what the real thing would.
"""

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear

from kdguard.model.load import quantization

BLOCK, OUTER_BLOCK = 64, 256  # weights of NF4 under one scale, and such scales under one of theirs


def network(
    config: PretrainedConfig, *, quant: str, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """The network on the meta device, its linear layers but the head in bitsandbytes' modules.

    quant: as TuneConfig has it. dtype: of what is not quantised, and of what it computes in. attention: the name of an
    implementation that transformers knows; by default what it would choose.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if quant != "none":
        head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        model = replace_with_bnb_linear(model, head, quantization(quant, dtype))
        setattr(model, f"is_loaded_in_{quant}", True)  # PEFT looks for it
    return model.requires_grad_(False)


def without_data(model: nn.Module) -> None:
    """Put fake tensors in the place of those on the meta device: packed NF4 weights and 8-bit ones with their scales.

    Call it under a FakeTensorMode. What shares a weight has to be tied again.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, FakeTensor):
                continue
            if name == "weight" and isinstance(module, bnb.nn.Linear4bit):
                module._parameters[name] = _nf4(module)
            elif name == "weight" and isinstance(module, bnb.nn.Linear8bitLt):
                module._parameters[name] = _int8(module)
            else:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _nf4(module: bnb.nn.Linear4bit) -> nn.Parameter:
    size = module.in_features * module.out_features
    blocks = -(-size // BLOCK)
    weight = nn.Parameter(torch.empty(-(-size // 2), 1, dtype=torch.uint8), requires_grad=False)
    of_scales = QuantState(
        torch.empty(-(-blocks // OUTER_BLOCK)), code=torch.empty(256), blocksize=OUTER_BLOCK, dtype=torch.float32
    )
    weight.quant_state = module.quant_state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((module.out_features, module.in_features)),
        dtype=module.compute_dtype,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        offset=torch.empty(()),
        state2=of_scales,
    )
    weight.quant_type, weight.compress_statistics, weight.bnb_quantized = "nf4", True, True
    module.support_avx512bf16_for_cpu = False
    return weight


def _int8(module: bnb.nn.Linear8bitLt) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(module.out_features, module.in_features, dtype=torch.int8), requires_grad=False)
    weight.has_fp16_weights, weight.CB, weight.SCB = False, None, None
    module.state.CB, module.state.SCB = weight.data, torch.empty(module.out_features)
    module.state.threshold = 0.0  # which columns are outliers only data tell
    return weight
