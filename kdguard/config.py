"""`TuneConfig`, the only home of defaults. A preset is overridden by a config file, and that by flags."""

import difflib
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from kdguard.config_file import read_config, refuse_absolute
from kdguard.data.formats import parse_columns
from kdguard.errors import InputError
from kdguard.files import shipped
from kdguard.probes.packs import shipped_packs

BUDGET = {"rehearsal": 2.0}  # what `--budget` changes of the defaults
STYLE = {"epochs": 2, "rehearsal": 0.0}  # what `--goal style` changes of the defaults, those of presets too
MOST_PACKED = 4096  # tokens that keep a GPU busy; a pack's attention mask grows with their square
BEST = "qwen2.5-7b", "qwen3-4b", "qwen2.5-1.5b"  # the preset that is taken on a GPU: the first of these that fits
# keys of a preset that describe its model and configure nothing
_META = {"name", "license", "about", "template", "target_modules", "head", "shape", "memory"}
_OWN = "revision", "lr", "rank", "max_length"  # what of a preset was made for its model alone


class TuneConfig(BaseModel):
    """Everything that decides a run. The description of a field is the help of its flag.

    Made by itself it has the defaults; `resolve` puts those of a model's preset in, as the command line does. Raises
    pydantic's ValidationError, which names every wrong key.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: list[str] = Field(
        default=[],
        description="training files (JSONL, JSON, CSV, TSV, Parquet), folders of them, or a dataset's id on the hub",
    )
    columns: dict[str, str] | None = Field(
        default=None, description="where columns are named otherwise: `question=Q,answer=A`, ours before the file's"
    )
    last_turn: bool = Field(
        default=False, description="teach only the last turn of a conversation, not all of the assistant's"
    )
    model: str = Field(description="hub id, local folder, or `demo`")
    revision: str | None = Field(default=None, description="hub revision (branch, tag or commit) of the model")
    trust_remote_code: bool = Field(
        default=False,
        description="run the Python code that comes with a model; no preset and no config file turns this on",
    )
    preset: str | None = Field(default=None, description="preset's name [default: the one made for the model]")
    out: Path | None = Field(default=None, description="run folder [default: runs/<data>-<model>-<time>]")
    probes: list[str] = Field(default=["world"], description="pack's name or file of old-knowledge probes; repeatable")
    prompts: int = Field(
        default=4,
        ge=1,
        le=10,
        description="ways of asking each old question that the base knows, to tell how well; with 1 it is not told",
    )
    goal: Literal["facts", "style"] = Field(
        default="facts",
        description="`facts` adapts every linear layer; `style` attention's output alone, which hardly learns facts",
    )
    layers: Literal["all", "upper-half"] = Field(
        default="all",
        description="layers of the decoder that are adapted; with `upper-half` the guard costs no more time than plain "
        "QLoRA on all of them, for teacher and tuned model share the lower half",
    )
    guard: bool = Field(default=True, description="hold the tuned model to the base; without it, plain QLoRA")
    guard_weight: float = Field(default=12.0, ge=0, description="weight λ of the guard's KL beside the cross-entropy")
    guard_temperature: float = Field(default=1.0, gt=0, description="temperature τ of the guard's KL")
    guard_masked: bool = Field(
        default=True, description="take the gold token out of the guard's KL at target positions"
    )
    teacher: Literal["base", "warmup"] = Field(
        default="base",
        description="what the guard holds the tuned model to: the `base`, or `warmup`, a snapshot after one pass over "
        "the rows that the base already knows, for base models without the data's answer format",
    )
    rehearsal: float = Field(
        default=1.0,
        ge=0,
        description="rehearsal rows, written by the base, per training row [default: 1; with a budget 2; for style 0]",
    )
    budget: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="largest forgetting accepted, such as `1%`: some probes watch it; over it, exit code 3",
    )
    epochs: int = Field(default=15, ge=1, description="passes over the training rows [default: 15; for style 2]")
    lr: float | None = Field(
        default=None,
        gt=0,
        description="peak learning rate; warm-up 3 %, then cosine to 0 [default: by the model's width]",
    )
    batch_size: int = Field(default=16, ge=1, description="training rows per optimiser step, of all processes")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="training rows in a process's memory at once [default: the largest divisor of its share up to 4]",
    )
    packing: bool = Field(
        default=True,
        description="put short rows one after another in place of padding them, as many tokens at once as "
        "`micro_batch_size` (here 1 by default) rows of `max_length` have",
    )
    max_length: int = Field(
        default=1024,
        ge=16,
        description="longest row, in tokens; a longer conversation is several rows, a longer prompt is cut",
    )
    offload: bool = Field(
        default=False,
        description="keep activation checkpoints in the computer's memory and not the GPU's: longer rows, slower steps",
    )
    shorten: bool = Field(
        default=False,
        description="when memory runs out and nothing else is left to try, cut the longest rows' beginnings",
    )
    embeddings: Literal["cpu", "gpu"] = Field(
        default="cpu",
        description="where a GPU's run keeps the table of input embeddings, if the output head has one of its own: the "
        "computer's memory saves about 1 GiB of the GPU's on a 7B model",
    )
    rank: int = Field(default=64, ge=1, description="LoRA rank; alpha equals it")
    quant: Literal["4bit", "8bit", "none"] = Field(default="4bit", description="quantisation of the base")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the rows' order, the adapter and the rehearsal")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        default="none", description="show losses and learning rate there too; wandb sends them to its servers"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_goal_and_budget(cls, values: Any) -> Any:
        by_budget = BUDGET if values.get("budget") is not None else {}
        by_goal = STYLE if values.get("goal") == "style" else {}
        return {**by_budget, **by_goal, **values}

    @field_validator("data", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if value is None:
            return []
        return [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)]

    @field_validator("columns", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = ",".join(f"{name}={column}" for name, column in value.items())
        return parse_columns(value) if isinstance(value, str) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        if isinstance(value, str) and (match := re.fullmatch(r"\s*([\d.]+)\s*%\s*", value)):
            return float(match[1]) / 100
        return value

    @field_validator("micro_batch_size")
    @classmethod
    def _divides(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("batch_size", value) % value:
            raise ValueError(f"--micro-batch-size {value} does not divide --batch-size {info.data['batch_size']}")
        return value

    @property
    def pack_tokens(self) -> int:
        """The size of a pack of rows, in tokens; a longer row fits all the same."""
        if self.micro_batch_size:
            return self.micro_batch_size * self.max_length
        return min(self.max_length, MOST_PACKED)

    @property
    def data_name(self) -> str | None:
        """The training data in short, for people; None where there are none."""
        return ", ".join(self.data) or None

    def to_yaml(self) -> str:
        """The resolved config, with absolute paths, as `kdguard tune --config` reads it back."""
        values = self.model_dump(mode="json")
        ours = {"demo", *shipped_packs()}

        def absolute(name: str) -> str:
            return str(Path(name).resolve()) if os.path.exists(name) and name not in ours else name

        values |= {key: [absolute(name) for name in values[key]] for key in ("data", "probes")}
        values["model"] = absolute(self.model)
        values["data"] = values["data"] if len(self.data) > 1 else next(iter(values["data"]), None)
        values["out"] = None
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@functools.cache  # the page asks at every key that is typed
def presets() -> dict[str, dict[str, Any]]:
    """Every shipped preset by name, its describing keys included. Not to be changed."""
    return {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted(shipped("presets").glob("*.yaml"))
    }


def preset_file(name: str) -> Path:
    """The file of a preset, for people to read. Raises InputError when there is none of this name."""
    if name not in presets():
        raise InputError(f"no preset named {name!r}", _did_you_mean(name, list(presets()), "presets"))
    return shipped("presets") / f"{name}.yaml"


def resolve(
    flags: dict[str, Any], config_file: Path | None = None, *, memory: Callable[[], float | None] = lambda: None
) -> TuneConfig:
    """The config that `kdguard tune` makes of flags: preset < config file < flags, each a key of TuneConfig.

    A flag that is None was not given.

    Without `--preset`, the preset whose model is the one asked for is taken, if there is one; where no model is asked
    for either, the first of BEST that fits into the GPU. memory: GiB of the GPU, None where there is none; what a
    preset has for that size is taken. Raises InputError that names every wrong key at once.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    from_file = read_config(config_file) if config_file else {}
    if config_file:
        refuse_absolute(config_file, from_file)
    chosen = given.get("preset", from_file.get("preset"))
    model = given.get("model", from_file.get("model"))
    available = presets()
    if chosen is None and model is None and (room := memory()):
        chosen = next((name for name in BEST if by_memory(available[name], room)), BEST[-1])
    if chosen is None:
        chosen = next(
            (name for name, preset in available.items() if model is not None and preset["model"] == model), None
        )
    else:
        preset_file(str(chosen))
    shipped_one = available.get(chosen or "", {})
    preset = {key: value for key, value in shipped_one.items() if key not in _META}
    if "memory" in shipped_one and (room := memory()):
        preset |= by_memory(shipped_one, room)
    if model is not None and preset and model != preset["model"]:
        preset = {key: value for key, value in preset.items() if key not in _OWN}
    if given.get("goal", from_file.get("goal")) == "style":
        preset = {key: value for key, value in preset.items() if key not in (*STYLE, "lr")}
    asked_for = {**from_file, **given}
    if asked_for.get("batch_size") and "micro_batch_size" not in asked_for:
        preset.pop("micro_batch_size", None)  # it was made for the preset's batch
    trusted = bool(given.get("trust_remote_code"))
    if from_file.get("trust_remote_code") and not trusted:
        raise InputError(
            f"{config_file}: the code that comes with the model was run for this config, and no file turns that on",
            "add --trust-remote-code, if you trust that code",
        )
    merged = {**preset, **asked_for, "preset": chosen, "trust_remote_code": trusted}
    if "model" not in merged:
        raise InputError(
            "no model was named, and there is no GPU for a 7B one",
            f"add --model FOLDER_OR_HUB_ID, or --preset with one of: {', '.join(available)}",
        )
    try:
        return TuneConfig(**merged)
    except ValidationError as error:
        raise _explain(error, config_file) from None


def by_memory(preset: dict[str, Any], room: float) -> dict[str, Any]:
    """What a preset has for a GPU of `room` GiB: that of the largest size that it reaches; nothing where it is smaller.

    Drivers keep a little of a card to themselves: one sold with 8 GB says 7.6.
    """
    sizes = [size for size in preset.get("memory", {}) if size <= room * 1.06]
    return dict(preset["memory"][max(sizes)]) if sizes else {}


def _explain(error: ValidationError, config_file: Path | None) -> InputError:
    problems, hints = [], []
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown config key {_short(key)}" + (f" in {config_file}" if config_file else ""))
            hints.append(_did_you_mean(key, list(TuneConfig.model_fields), "keys"))
        else:
            reason = item["msg"].removeprefix("Value error, ")
            problems.append(f"--{key.replace('_', '-')} {_short(item['input'])}: {reason[0].lower()}{reason[1:]}")
            hints.append(f"--{key.replace('_', '-')}: {TuneConfig.model_fields[key].description}")
    return InputError("; ".join(problems), "; ".join(dict.fromkeys(hints)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _did_you_mean(word: str, known: list[str], what: str) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{what}: {', '.join(known)}"
