"""Will it fit? One training step is run on tensors without data, and what it allocates is counted.

The step is the real one: the model's own modules, bitsandbytes' and PEFT's layers, checkpointing, teacher and loss. So
nothing has to be downloaded but the config, and no family of models needs formulas of its own.
"""

import bisect
import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.polynomial import Polynomial
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kdguard.config import MOST_PACKED, TuneConfig, presets
from kdguard.guard.lean import CHECKPOINTING
from kdguard.guard.loss import PIECE
from kdguard.guard.lower import lower_layers
from kdguard.guard.teacher import Guard, install
from kdguard.model.embedding import free_embeddings
from kdguard.model.empty import network, without_data
from kdguard.model.load import Base, add_adapter, load_config, source
from kdguard.model.memory import batch_rows
from kdguard.model.meter import Meter
from kdguard.probes.answer import MAX_NEW_TOKENS

LINES = ("weights", "adapter", "gradients", "optimiser", "activations", "teacher", "loss", "answers")
TRAINING = "teacher", "activations", "loss"  # the phases of a step: teacher's forward, student's with backward, loss
LAYERS = 2, 4  # of which the step is run, where a model has more: each layer takes as much as any other
PACKED = 1024, 2048, MOST_PACKED  # lengths that are run, tokens; they tell of those between and beyond
LONG = 4608, 6144, 8192
ONE_ROW = "one-row"  # attention without a mask, as a row that is alone in its micro-batch has it
PROMPT = 32  # tokens of a usual probe

AttentionInterface.register(ONE_ROW, sdpa_attention_forward)
AttentionMaskInterface.register(ONE_ROW, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class Estimate:
    """The memory of a run at its worst moment, in bytes.

    lines: what it is for, by LINES; `answers` is what those take beyond the training. phases: all that is alive at the
    worst moment of each phase.
    """

    lines: dict[str, float]
    phases: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.lines.values())

    @property
    def training(self) -> float:
        return self.total - self.lines["answers"]


def config_of(config: TuneConfig) -> PretrainedConfig:
    """The config of the model: as its preset has it, or else read from its folder or fetched from the hub."""
    preset = presets().get(config.preset or "", {})
    if "shape" in preset and preset["model"] == config.model:
        return AutoConfig.for_model(**preset["shape"])
    return load_config(config.model, config.revision, weights=False, trust_remote_code=config.trust_remote_code)


def parameters(of: PretrainedConfig) -> int:
    return network(of, quant="none", dtype=torch.bfloat16).num_parameters()


def estimate(config: TuneConfig, of: PretrainedConfig, length: int, *, gpu: bool) -> Estimate:
    """What it takes to tune a model with the config `of`, where the longest row has `length` tokens.

    gpu: in 16 bits, with activation checkpointing and an 8-bit optimiser; else in 32 bits without, as on a CPU.
    """
    if length <= LONG[-1]:
        return _together(_peaks(config, of, length, gpu))
    return _by_length(config, of, LONG, gpu)(length)


def needed_gib(config: TuneConfig, of: PretrainedConfig, length: int) -> float | None:
    """The total of `estimate` on this computer; None for an architecture that does not run without data."""
    try:
        return estimate(config, of, length, gpu=torch.cuda.is_available()).total / 2**30
    except Exception:  # whatever a model's own code raises that looks at its data
        return None


def longest(config: TuneConfig, of: PretrainedConfig, rooms: Sequence[float], *, gpu: bool) -> list[int]:
    """The largest `max_length`, in tokens, with which a run stays within each of `rooms` bytes; 0 where none does."""
    most = getattr(of.get_text_config(), "max_position_embeddings", None) or LONG[-1]
    packed = _by_length(config, of, PACKED, gpu)
    long = _by_length(config, of, LONG, gpu) if packed(MOST_PACKED).total <= max(rooms) else packed

    def within(room: float) -> int:
        needs = long if packed(MOST_PACKED).total <= room else packed
        return bisect.bisect_right(range(1, most + 1), room, key=lambda length: needs(length).total)

    return [within(room) for room in rooms]


def _by_length(
    config: TuneConfig, of: PretrainedConfig, lengths: Sequence[int], gpu: bool
) -> Callable[[int], Estimate]:
    """`estimate` as a polynomial in the length: a square where there is an attention mask, else a line."""
    last = config.model_copy(update={"max_length": lengths[-1]})
    if _alone(last, lengths[-1]) and _has_sdpa(of):
        lengths = lengths[:2]
    runs = [_peaks(config.model_copy(update={"max_length": length}), of, length, gpu) for length in lengths]
    curves = {
        (phase, label): Polynomial.fit(lengths, [run[phase][label] for run in runs], len(lengths) - 1)
        for phase, peak in runs[-1].items()
        for label in peak
    }
    return lambda length: _together(
        {
            phase: Counter({label: float(curves[phase, label](length)) for label in peak})
            for phase, peak in runs[-1].items()
        }
    )


def tokens_at_once(config: TuneConfig, length: int) -> tuple[int, int]:
    """(rows, tokens) of the largest micro-batch: a pack of rows is one."""
    rehearsed = 1 + (config.rehearsal if config.guard else 0)
    if config.packing:
        return 1, max(length, min(config.pack_tokens, round(config.batch_size * rehearsed * length)))
    return round((config.micro_batch_size or min(4, config.batch_size)) * rehearsed), length


def _alone(config: TuneConfig, length: int) -> bool:
    """Whether the longest row fills its micro-batch: attention needs no mask then."""
    return config.packing and length > config.pack_tokens


def _has_sdpa(of: PretrainedConfig) -> bool:
    return network(of, quant="none", dtype=torch.bfloat16).config._attn_implementation == "sdpa"


def _peaks(config: TuneConfig, of: PretrainedConfig, length: int, gpu: bool) -> dict[str, Counter[str]]:
    """The bytes by label at the worst moment of each phase."""
    layers = of.get_text_config().num_hidden_layers
    few, more = LAYERS
    if layers <= more:
        return _run(config, of, length, gpu, layers)
    fewer, peaks = (_run(config, of, length, gpu, n) for n in (few, more))
    return {
        phase: Counter(
            {
                label: size + (size - fewer[phase][label]) * (layers - more) / (more - few)
                for label, size in peak.items()
            }
        )
        for phase, peak in peaks.items()
    }


def _run(config: TuneConfig, of: PretrainedConfig, length: int, gpu: bool, layers: int) -> dict[str, Counter[str]]:
    rows, tokens = tokens_at_once(config, length)
    dtype = torch.bfloat16 if gpu else torch.float32
    together = batch_rows(network(of, quant="none", dtype=dtype), PROMPT + MAX_NEW_TOKENS)
    few = copy.deepcopy(of)
    text = few.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    base = network(few, quant=config.quant, dtype=dtype)
    if _alone(config, length) and base.config._attn_implementation == "sdpa":
        base.set_attn_implementation(ONE_ROW)
    base.name_or_path = source(config.model)
    model = add_adapter(
        Base(config.model, base, None),
        rank=config.rank,
        layers="attention output" if config.goal == "style" else "all",
        upper_half=config.layers == "upper-half",
    )
    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=gpu)
    meter = Meter()
    with FakeTensorMode(), meter, _as_on_gpu() if gpu else contextlib.nullcontext():
        meter.label = "weights"
        without_data(base)
        base.tie_weights()
        if gpu and config.embeddings == "cpu" and config.quant != "none":
            meter.live["weights"] -= free_embeddings(base)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        size = sum(parameter.nbytes for parameter in trained)
        meter.live["weights"] -= size
        meter.live["adapter"] += size
        meter.label = "optimiser"
        moments = [torch.empty(2, *each.shape, dtype=torch.uint8 if gpu else None) for each in trained]
        meter.label = "answers"
        with autocast():
            _answer(model, together)
        meter.label = "gradients"
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        install(model, Guard(config.guard_weight if config.guard else 0.0), lower=lower_layers(base))
        if gpu or config.offload:
            base.activation_checkpointing_enable(CHECKPOINTING)
        if gpu and config.offload:
            for module in base.modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = _offloaded
        model.train()
        meter.label = "activations"
        ids = torch.empty(rows, tokens, dtype=torch.long)
        apart = "position_ids" if config.packing else "attention_mask"
        count = torch.ones(())
        with autocast():
            loss = model(input_ids=ids, labels=ids, counts=(count, count), **{apart: ids})["loss"]
        loss.backward()
    del moments
    return meter.peaks


@torch.no_grad()
def _answer(model: PeftModel, rows: int) -> None:
    """As `generate` has it in memory in the end: the cache of all tokens, and the last logits' probabilities."""
    ids = torch.empty(rows, PROMPT + MAX_NEW_TOKENS, dtype=torch.long)
    model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.float().softmax(-1)


def _together(peaks: dict[str, Counter[str]]) -> Estimate:
    training = max((peaks[phase] for phase in TRAINING if phase in peaks), key=Counter.total)
    beyond = max(0, peaks["answers"].total() - training.total())
    return Estimate(
        {**{name: training[name] for name in LINES}, "answers": beyond},
        {phase: peaks[phase].total() for phase in (*TRAINING, "answers") if phase in peaks},
    )


def _offloaded(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """A checkpoint whose inputs wait elsewhere for the backward."""
    with saved_tensors_hooks(lambda kept: (kept.shape, kept.dtype), lambda was: torch.empty(was[0], dtype=was[1])):
        return checkpoint(function, *args, **kwargs, **CHECKPOINTING)


@contextlib.contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Autocast and the loss's pieces as on a GPU: without one, torch makes no tensors that say they are there."""
    torch.set_autocast_enabled("cuda", True)  # PEFT asks for it
    pieces = dict(PIECE)
    PIECE.clear()
    try:
        yield
    finally:
        PIECE.update(pieces)
        torch.set_autocast_enabled("cuda", False)
