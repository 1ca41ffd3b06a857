"""Load a quantised base, put LoRA on it, and look at the base with the adapters switched off."""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from kdguard.data.tokens import with_chat_template
from kdguard.demo import MODEL as DEMO
from kdguard.errors import InputError, OutOfMemory
from kdguard.files import writing_folder
from kdguard.model.adapter import put_adapter
from kdguard.model.embedding import LookedUp, free_embeddings
from kdguard.model.folder import BROKEN, ask_hub, check_weights, code_needed, refuse_links_out, unloadable
from kdguard.model.memory import ran_out
from kdguard.model.sharded import adapter_weights
from kdguard.processes import by_main, sharded


@dataclass
class Base:
    """A loaded base with its tokenizer. `name` is what the person asked for."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def parameters(self) -> int:
        table = self.model.get_input_embeddings()
        return self.model.num_parameters() + (table.weight.numel() if isinstance(table, LookedUp) else 0)


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def uuid() -> str | None:
    """The GPU's, as nvidia-smi has it; None where there is none."""
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else None


def compute_dtype() -> torch.dtype:
    """bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU."""
    if device().type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def quantization(quant: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What bitsandbytes makes of the linear layers: NF4 with double quantisation, 8-bit, or nothing."""
    return {
        "4bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if sharded() else torch.uint8,  # of the type that is sharded with the rest
        ),
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }[quant]


def load_config(
    name: str, revision: str | None = None, *, weights: bool = True, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of a hub id, a local folder or `demo`. Raises InputError when there is no such model.

    weights: whether a folder needs them too. trust_remote_code: whether code that comes with the model may be run.
    """
    path = Path(name)
    if name != "demo" and os.path.isdir(name):
        if not (path / "config.json").is_file():
            raise InputError(
                f"{name}: found no config.json in this folder", "--model FOLDER with a transformers model in it"
            )
        if weights:
            check_weights(path)
    elif name != "demo" and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise InputError(
            f"{name}: no such model folder", "--model FOLDER, --model OWNER/NAME from the hub, or --model demo"
        )
    if name != "demo" and not os.path.isdir(name):
        ask_hub(name, revision)
    try:
        config = AutoConfig.from_pretrained(source(name), revision=revision, trust_remote_code=trust_remote_code)
    except BROKEN as error:
        raise unloadable(name, error) from None
    if "/" in str(config._attn_implementation) and not trust_remote_code:  # a kernel, to be fetched from the hub
        raise code_needed(name)
    return config


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, ready to render conversations. Raises InputError as `load_config` does."""
    load_config(name, revision, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source(name), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises no other kind for a broken file
        raise unloadable(name, error) from None
    return with_chat_template(tokenizer)


def load_base(
    name: str,
    *,
    quant: str = "4bit",
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    embeddings: str = "cpu",
    trust_remote_code: bool = False,
    spread: bool = False,
) -> Base:
    """Load a causal language model, frozen: NF4 with double quantisation (QLoRA, arXiv 2305.14314), 8-bit, or as it is.

    name: a hub id, a local folder, or `demo`. quant: `4bit`, `8bit` or `none`. revision: of the hub. tokenizer: in
    place of the model's own. embeddings: where (`cpu`, `gpu`) a quantised model on a GPU has its table of input
    embeddings, if the head does not share it.
    spread: keep in the computer's memory what the GPU has no room for; slow, and only for asking.

    Raises InputError when the model is not there or cannot be loaded, OutOfMemory when it does not fit by itself.
    """
    gc.collect()  # a base that an earlier run has left behind: two may not fit into memory
    config = load_config(name, revision, trust_remote_code=trust_remote_code)
    if hasattr(config, "attention_dropout"):
        config.attention_dropout = 0.0  # teacher and student must see the same network
    dtype = compute_dtype()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source(name),
            revision=revision,
            config=config,
            dtype=dtype,
            quantization_config=quantization(quant, dtype),
            device_map="auto" if spread else {"": device()},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (*BROKEN, MemoryError) as error:
        if ran_out(error):
            raise OutOfMemory(
                f"{name}: memory ran out while the base was loaded",
                "close what else uses the GPU, or take a smaller model: kdguard presets",
            ) from None
        raise unloadable(name, error) from None
    for module in model.modules():
        # bitsandbytes repacks a 4-bit weight in place on the first no-grad forward in eval mode on CPUs with
        # AVX512-BF16; after that, backward through it silently gives its input no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.requires_grad_(False)
    if device().type == "cuda" and quant != "none" and embeddings == "cpu":
        free_embeddings(model)
    model.generation_config = plain_generation(model.generation_config)
    return Base(name, model, tokenizer or load_tokenizer(name, revision, trust_remote_code=trust_remote_code))


def plain_generation(made: GenerationConfig) -> GenerationConfig:
    """Greedy is greedy and T = 1 is T = 1: none of the makers' penalties and filters."""
    return GenerationConfig(
        bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id
    )


def load_tuned(base: Base, adapter: Path, name: str = "default") -> PeftModel:
    """Put a trained adapter on its base, or beside those it has, under a name that is its own.

    Raises InputError when it is not there, is not plain LoRA or does not belong to it.
    """
    return put_adapter(base.model, adapter, name)


def own_tokenizer(adapter: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with an adapter, as other tools do, for its chat template may not be the base's."""
    if not (adapter / "tokenizer_config.json").is_file():
        return None
    refuse_links_out(adapter)
    try:
        return with_chat_template(AutoTokenizer.from_pretrained(adapter, trust_remote_code=False))
    except Exception as error:  # as in load_tokenizer
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{adapter}: the tokenizer in this folder could not be loaded ({reason})",
            "delete its tokenizer files to use the base's",
        ) from None


STYLE_LR = 1.4
_ATTENTION = r"\b(self_)?att(n|ention)\b"
LAYERS = {
    "all": "",
    "attention": _ATTENTION,
    "attention output": _ATTENTION + r".*\b(o_proj|out_proj|c_proj|dense|wo)$",
}


def layer_stack(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """The layers of the decoder, from the lowest on, whatever their architecture calls them; None if there is none."""
    n = model.config.get_text_config().num_hidden_layers
    lists = (part for part in model.get_decoder().modules() if isinstance(part, torch.nn.ModuleList))
    return next((found for found in lists if len(found) == n), None)


def add_adapter(base: Base, *, rank: int, layers: str = "all", upper_half: bool = False) -> PeftModel:
    """Put LoRA (alpha = rank, no dropout) on linear layers of the decoder: those that LAYERS has under `layers`.

    upper_half: on the layers of its upper half alone, the middle one of an odd number among them.

    The output head and the embeddings stay frozen, for teacher and student share them, and so does whatever text does
    not pass through, such as a vision tower.
    """
    adapted, left, depths = base.model.get_decoder(), torch.nn.ModuleList(), None
    if upper_half:
        stack = layer_stack(base.model)
        if stack is None:
            raise InputError(f"{base.name}: found no stack of layers in this architecture", "--layers all")
        half = len(stack) // 2
        adapted, left, depths = stack[half:], stack[:half], list(range(half, len(stack)))
    inside, below = ({id(module) for module in part.modules()} for part in (adapted, left))
    linear = {
        name: module for name, module in base.model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    chosen = [name for name, module in linear.items() if id(module) in inside and re.search(LAYERS[layers], name)]
    if not chosen:
        raise InputError(f"{base.name}: found no attention layers to adapt in this architecture", "--goal facts")
    kinds = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    others = [
        name
        for name, module in linear.items()
        if name not in chosen and id(module) not in below and name.rsplit(".", 1)[-1] in kinds
    ]
    # By kind, as people write it, unless the same kind of layer stands where it must not be adapted.
    targets = chosen if others else kinds
    return get_peft_model(
        base.model,
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            target_modules=targets,
            layers_to_transform=depths,
            base_model_name_or_path=str(source(base.name)),
        ),
    )


def save_adapter(model: PeftModel, folder: Path, adapter: str | None = None) -> None:
    """Save one adapter, the active one by default, in PEFT's format; `folder` is replaced as a whole.

    PEFT puts an adapter that is not named `default` into a folder of its name within. Of several processes all have to
    call it, and the main one writes.
    """

    weights = adapter_weights(model)

    def write() -> None:
        with writing_folder(folder) as beside:
            model.save_pretrained(beside, selected_adapters=[adapter or model.active_adapter], state_dict=weights)

    by_main(write)


def default_lr(model: PreTrainedModel, goal: str = "facts") -> float:
    """A peak learning rate for LoRA on a network this wide, whatever its rank: 3e-4 at 4096, 2.5e-3 at 256.

    Style is learned in two passes at a rate STYLE_LR times as high (`benchmarks/style.py`).

    Source: the fit 5e-5 * 10 * (2000 / hidden size)**0.781 of "LoRA Without Regret" (Schulman et al. 2025) for Llama;
    rounded to two digits.
    """
    rate = 5e-4 * (2000 / model.config.get_text_config().hidden_size) ** 0.781
    return float(f"{rate * (STYLE_LR if goal == 'style' else 1):.1e}")


@contextmanager
def base_view(model: PeftModel) -> Iterator[PreTrainedModel]:
    """The base itself: inside, every adapter is off and nothing needs a gradient; outside, all is as before."""
    with torch.no_grad(), model.disable_adapter():
        yield model.get_base_model()


def source(name: str) -> str:
    """Where the hub's libraries find a model: its folder or its id."""
    return str(DEMO) if name == "demo" else name
