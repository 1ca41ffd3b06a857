"""What `kdguard fit` says is what training allocates: the same steps, once with data and once without."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from kdguard import fit
from kdguard.card import SIZES, of_size, parse_size
from kdguard.cli import app
from kdguard.config import TuneConfig, by_memory, presets, resolve
from kdguard.data.batches import Collator, pack
from kdguard.data.tokens import Row
from kdguard.errors import InputError
from kdguard.guard.lean import CHECKPOINTING, Lean
from kdguard.guard.teacher import Guard, install
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model import load
from kdguard.model.embedding import free_embeddings
from kdguard.model.load import add_adapter, load_base, load_tokenizer
from kdguard.training import training_arguments

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("llama")` -> the folder of a random model of SHAPE."""

    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE)).save_pretrained(folder)
        load_tokenizer("demo").save_pretrained(folder)
        return str(folder)

    return make


def held(model: PeftModel) -> int:
    """Bytes of a model's tensors, the scales of quantised weights among them."""
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules())
    scales = (each for state in states if state for each in (state.absmax, state.state2.absmax, state.state2.code))
    return model.get_memory_footprint() + sum(scale.nbytes for scale in scales)


def peak(profiled: profile) -> int:
    """The most bytes that torch's allocator held at once, beyond what it held before."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def random_rows(n: int, length: int) -> list[Row]:
    ids = torch.randint(10, 2000, (n, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [Row(row, row) for row in ids]


@pytest.mark.parametrize(
    ("kind", "length", "settings"),
    [
        ("llama", 512, {}),
        ("llama", 96, {"guard": False}),
        ("llama", 512, {"layers": "upper-half"}),
        ("llama", 512, {"offload": True}),
        ("llama", 128, {"quant": "8bit"}),
        ("llama", 128, {"quant": "none", "goal": "style"}),
        ("qwen3", 256, {"rank": 16}),
        ("gemma2", 256, {}),
        ("llama", 256, {"packing": False, "micro_batch_size": 4}),
        ("llama", 256, {"packing": False, "micro_batch_size": 4, "guard": False}),
    ],
)
def test_an_estimate_is_what_training_allocates(saved, tmp_path, kind, length, settings):
    config = TuneConfig(model=saved(kind), max_length=length, rehearsal=0, batch_size=4, lr=1e-4, epochs=1, **settings)
    base = load_base(config.model, quant=config.quant)
    model = add_adapter(
        base,
        rank=config.rank,
        layers="attention output" if config.goal == "style" else "all",
        upper_half=config.layers == "upper-half",
    )
    before = held(model)
    # Of one row less a few tokens, for padding is what makes a mask.
    rows = random_rows(8, length) if config.packing else [*random_rows(7, length), *random_rows(1, length - 9)]
    trainer = GuardedTrainer(
        model,
        training_arguments(config, tmp_path).__class__(
            **{
                **training_arguments(config, tmp_path).to_dict(),
                "save_strategy": "no",
                "eval_strategy": "no",
                "accelerator_config": None,
            }
        )
        if False
        else training_arguments(config, tmp_path),
        train_dataset=rows,
        data_collator=pack if config.packing else Collator(0),
        guard=Guard(config.guard_weight if config.guard else 0.0),
        keep_teacher=False,
        packing=config.pack_tokens if config.packing else None,
        lean=Lean(offload=config.offload),
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.train()
    estimate = fit.estimate(config, AutoConfig.from_pretrained(config.model), length, gpu=False)
    assert estimate.training == pytest.approx(
        before + peak(profiled), rel=0.1 if settings.get("packing") is False else 0.03
    )
