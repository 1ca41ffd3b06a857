"""kdguard out of a checkout, on a machine that has torch, transformers 5, peft and accelerate and little else.

`import bare` before kdguard. What is stood in for is only what a training step on ready rows does without: pyarrow
(data on disk), ftfy and rensa (data check), pydantic (a config's checks; its defaults are kept), and what transformers
calls otherwise before 5.23.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
USED = "pyarrow", "pyarrow.compute", "pydantic", "ftfy", "ftfy.badness", "ftfy.fixes", "rensa"
MISSING = [name for name in USED if importlib.util.find_spec(name.split(".")[0]) is None]


class _Model:
    """pydantic's BaseModel without its checks: the defaults of the class, and what is given."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def model_copy(self, update: dict[str, Any]) -> "_Model":
        return type(self)(**{**vars(self), **update})


class _StandIn(ModuleType):
    """A module that has every name, for who only asks for them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


def _pydantic(module: ModuleType) -> None:
    module.BaseModel, module.ConfigDict = _Model, dict
    module.Field = lambda default=None, **about: default
    module.field_validator = module.model_validator = lambda *fields, **when: lambda method: method


def _older_transformers() -> bool:
    """Name what 5.23 brought as the versions before it have it; whether this is one of them."""
    from transformers import PreTrainedModel, TrainingArguments
    from transformers.utils import chat_template_utils

    for name in ("encode_marked_chat", "mark_control_tokens"):
        if not hasattr(chat_template_utils, name):
            setattr(chat_template_utils, name, None)
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        return False
    from kdguard import training
    from kdguard.errors import OutOfMemory

    def arguments(*, activation_checkpointing: bool, activation_checkpointing_kwargs: dict, **rest: Any) -> Any:
        made = TrainingArguments(
            gradient_checkpointing=activation_checkpointing,
            gradient_checkpointing_kwargs=activation_checkpointing_kwargs,
            **rest,
        )
        made.activation_checkpointing = activation_checkpointing  # LeanTrainer asks for it
        return made

    def enable(self: PreTrainedModel, kwargs: dict, offload: bool = False) -> None:
        if offload:
            raise OutOfMemory("this version of transformers cannot offload checkpoints", "transformers 5.23")
        self.gradient_checkpointing_enable(kwargs)

    training.TrainingArguments = arguments
    PreTrainedModel.activation_checkpointing_enable = enable
    return True


def versions() -> dict[str, str | None]:
    """Of what decides the figures; None where it is missing. One without metadata is asked itself."""
    found: dict[str, str | None] = {}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            try:
                found[name] = getattr(importlib.import_module(name), "__version__", "without a version")
            except ImportError:
                found[name] = None
    return found


for _name in MISSING:
    sys.modules[_name] = _StandIn(_name)
if "pydantic" in MISSING:
    _pydantic(sys.modules["pydantic"])
CAN_OFFLOAD = not _older_transformers()  # activation checkpoints
for _name in ("kdguard.fit", "kdguard.guard.trainer", "kdguard.training"):
    importlib.import_module(_name)
# Nobody else is to take what stands in for the real thing.
for _name in MISSING:
    del sys.modules[_name]
