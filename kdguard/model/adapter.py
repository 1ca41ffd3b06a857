"""An adapter's folder, which may be anybody's: read as data, and refused unless it is plain LoRA that fits the model.

PEFT warns of tensors that are missing and passes over those that are too many, imports the module that a config names,
matches its regular expressions for as long as they take, and reads pickles (peft#2699). Nothing gets that far here.
"""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from kdguard.errors import InputError
from kdguard.model.folder import refuse_links_out

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LARGEST_CONFIG = 2**20  # bytes
MATCHING = 2.0  # seconds for a regular expression and all the names of a model's modules
_LORA = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_KEEP_THE_BASE = ("true", "false", "gaussian", "orthogonal", "eva")  # ways to start LoRA; others take it from the base
_PASSED_OVER = {"peft_version", "auto_mapping", "inference_mode", "runtime_config", "init_lora_weights", "eva_config"}
_IN_WORDS = {
    "use_dora": "DoRA",
    "modules_to_save": "whole layers trained (modules_to_save)",
    "bias": "trained biases",
    "lora_bias": "trained biases",
    "trainable_token_indices": "trained tokens",
}


def _without_repeats(pattern: str) -> str:
    """PEFT tries some patterns on every module, and one that repeats can take for ever."""
    if len(pattern) > 1000 or re.search(r"(?<!\\)[*+?{]", pattern):
        raise ValueError("expected names, or patterns without repeats")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise ValueError("expected names, or patterns") from None
    return pattern


_Rank = Annotated[int, Field(ge=1, le=2**16)]
_Alpha = Annotated[int | float, Field(gt=0, le=2**20)]
_Pattern = Annotated[str, AfterValidator(_without_repeats)]
_Name = Annotated[str, Field(pattern=r"^[\w.]+$")]


class _Plain(BaseModel):
    """What a config may say of plain LoRA."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    lora_dropout: Annotated[int | float, Field(ge=0, lt=1)] = 0.0
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    target_modules: list[str] | Annotated[str, Field(max_length=2000)] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | _Pattern | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[_Name] | _Name | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, _Alpha] | None = None


def read_adapter(folder: Path) -> LoraConfig:
    """The config of the adapter in a folder. Raises InputError for what is not plain LoRA in safetensors.

    Plain means that switching it off gives the base back and scaling its B turns it down.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder}: found no PEFT adapter here (there is no {CONFIG})",
            f"name the folder with {CONFIG} and {WEIGHTS} in it",
        )
    refuse_links_out(folder)
    if not (folder / WEIGHTS).is_file():
        found = f"only pickled weights ({PICKLED})" if (folder / PICKLED).exists() else "no weights"
        raise InputError(f"{folder}: found {found}, expected {WEIGHTS}", _convert(folder))
    said = _read_json(path)
    found = said.get("peft_type")
    if found != "LORA":
        raise InputError(f"{path}: found {_short(found)} as peft_type, expected plain LoRA", "train plain LoRA")
    start = str(said.get("init_lora_weights", True)).lower()
    wrong = [] if start in _KEEP_THE_BASE else [f"a base changed by {_short(start)[1:-1]}"]
    default = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for key, value in said.items():
        # Of a newer PEFT's keys, a number or a word may belong to what is off.
        on = value != default[key] if key in default else value is True or isinstance(value, (dict, list))
        if value and on and key not in _PASSED_OVER and key not in _Plain.model_fields:
            wrong.append(_IN_WORDS.get(key, _short(key)))
    if wrong:
        found = ", ".join(list(dict.fromkeys(wrong))[:5])
        raise InputError(f"{path}: found {found}, expected plain LoRA", "merge it, or train plain LoRA")
    try:
        plain = _Plain.model_validate(said).model_dump(exclude_none=True)
        return LoraConfig(**plain, inference_mode=True)
    except ValidationError as error:
        first = error.errors()[0]
        where, found = ".".join(map(str, first["loc"][:2])), _short(first["input"])
        raise InputError(f"{path}: found {found} as {_short(where)}: {first['msg']}", _SAVE_AGAIN) from None
    except (TypeError, ValueError) as error:  # of PEFT's own checks
        raise InputError(f"{path}: found a config that PEFT refuses ({_line(error)})", _SAVE_AGAIN) from None


def put_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """Load an adapter onto a base, beside the others that it has, or over the one of the same name.

    Raises InputError when a tensor is missing, too many, of another shape than the model's, or holds NaN or infinity.
    """
    config, tensors = read_adapter(folder), _read_tensors(folder / WEIGHTS)
    fresh = not isinstance(model, PeftModel) or name not in model.peft_config
    try:
        if fresh:  # empty at first, so that no memory goes to a rank that the file does not have
            _name_targets(config, model, folder / CONFIG)
            if isinstance(model, PeftModel):
                model.add_adapter(name, config, low_cpu_mem_usage=True)
                tuned = model
            else:
                tuned = PeftModelForCausalLM(model, config, name, low_cpu_mem_usage=True)
        else:
            tuned = model
        _refuse_misfit(tuned, name, tensors, folder)
        done = set_peft_model_state_dict(tuned, tensors, adapter_name=name, low_cpu_mem_usage=fresh)
        missing = [key for key in done.missing_keys if "lora_" in key and name in key.split(".")]
        if missing or done.unexpected_keys:
            raise _misfit(folder, _list("missing", missing) + _list("extra", done.unexpected_keys))
    except (ValueError, TypeError, RuntimeError, OverflowError, InputError) as error:
        if fresh:
            take_off(model, name)
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{folder}: this adapter could not be loaded ({_line(error)})", "tune again, or name its own base"
        ) from None
    if fresh:
        tuned.eval()
    return tuned


_SAVE_AGAIN = "save the adapter again with the tool that made it, or download it again"


def _convert(folder: Path) -> str:
    if not (folder / PICKLED).exists():
        return "download or save the whole adapter there"
    return (
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{folder / PICKLED}', weights_only=True), '{folder / WEIGHTS}')\""
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise InputError(f"{path}: found {path.stat().st_size:,} bytes, expected a short config", _SAVE_AGAIN)
        said = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})", f"ls -l {path}") from None
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line}: found no JSON", _SAVE_AGAIN) from None
    if not isinstance(said, dict):
        raise InputError(f"{path}: found {type(said).__name__}, expected a PEFT adapter's config", _SAVE_AGAIN)
    return said


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: found a broken safetensors file ({_line(error)})", _SAVE_AGAIN) from None
    if not tensors:
        raise InputError(f"{path}: found no tensors", _SAVE_AGAIN)
    extra = [name for name in tensors if not name.endswith(_LORA)]  # PEFT would write them over the base's own
    if extra:
        raise _misfit(path.parent, _list("extra", extra))
    wrong = [name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]
    if wrong:
        found = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        raise InputError(f"{path}: found {found} numbers in {_short(wrong[0])}, expected floats", _SAVE_AGAIN)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(
            f"{path}: found NaN or infinity in {len(broken):,} tensors, first in {_short(broken[0])}",
            "its training diverged: tune again with a lower --lr, or take an earlier checkpoint",
        )
    return {name: tensor.float() for name, tensor in tensors.items()}  # as PEFT trains them


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _name_targets(config: LoraConfig, model: PreTrainedModel | PeftModel, path: Path) -> None:
    """Put the modules' names in place of a regular expression for them, matched within MATCHING seconds."""
    pattern = config.target_modules
    if not isinstance(pattern, str) or pattern.lower() == "all-linear":
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    until = time.monotonic() + MATCHING
    try:
        compiled = regex.compile(pattern)
        names = {name.replace(".base_layer", "") for name, _ in base.named_modules() if ".lora_" not in name}
        chosen = {name for name in names if compiled.fullmatch(name, timeout=max(until - time.monotonic(), 1e-3))}
    except TimeoutError:
        reason = f"takes more than {MATCHING:g} seconds"
        raise InputError(f"{path}: found a pattern in target_modules that {reason}", _SAVE_AGAIN) from None
    except (regex.error, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: found a broken pattern in target_modules ({_line(error)})", _SAVE_AGAIN) from None
    if not chosen:
        raise InputError(f"{path}: found no module {_short(pattern)} in this model", "name the adapter's own base")
    config.target_modules = chosen


def _refuse_misfit(model: PeftModel, name: str, tensors: dict[str, Tensor], folder: Path) -> None:
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes = [
        f"{_short(key)} is {list(tensor.shape)}, expected {list(own[key].shape)}"
        for key, tensor in tensors.items()
        if key in own and own[key].shape != tensor.shape
    ]
    if shapes:
        more = f" and {len(shapes) - 2:,} more" if len(shapes) > 2 else ""
        raise _misfit(folder, ["shapes that differ: " + "; ".join(shapes[:2]) + more])


def _list(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
    return [f"{what}: {', '.join(map(_short, names[:2]))}{more}"]


def _misfit(folder: Path, what: list[str]) -> InputError:
    return InputError(
        f"{folder}: this adapter's tensors are not those that the model has room for; {'; '.join(what)}",
        "name its own base, or save it again with its own config",
    )


def take_off(model: PreTrainedModel | PeftModel, name: str) -> None:
    """What was put on in part, so that the model is what it was."""
    beside = isinstance(model, PeftModel)
    for place, module in reversed(list(model.named_modules())):
        if isinstance(module, BaseTunerLayer) and beside:
            module.delete_adapter(name)
        elif isinstance(module, BaseTunerLayer):
            above, _, last = place.rpartition(".")
            setattr(model.get_submodule(above), last, module.get_base_layer())
    if beside:
        model.peft_config.pop(name, None)
    else:
        vars(model).pop("peft_config", None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
