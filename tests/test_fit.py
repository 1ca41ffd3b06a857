"""What `kdguard fit` says is what training allocates: the same steps, once with data and once without."""

import itertools
import json

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
    if config.packing:
        length //= 2  # two rows are packed
    # Padding is what makes a mask: where rows are not packed, no two are of one length.
    rows = [row for i in range(8) for row in random_rows(1, length - (0 if config.packing else i))]
    trainer = GuardedTrainer(
        model,
        training_arguments(config, tmp_path),
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
    assert estimate.training == pytest.approx(before + peak(profiled), rel=0.05)


def test_an_estimate_for_a_gpu_is_what_its_types_allocate(saved, monkeypatch):
    """The very tensors that a GPU would hold, on this computer: 16 bits, autocast, checkpoints, no embeddings."""
    config = TuneConfig(model=saved("llama"), max_length=512, rehearsal=0)
    monkeypatch.setattr(load, "compute_dtype", lambda: torch.bfloat16)
    base = load_base(config.model)
    assert free_embeddings(base.model) == 4096 * 256 * 2
    model = add_adapter(base, rank=config.rank)
    install(model, Guard())
    base.model.activation_checkpointing_enable(CHECKPOINTING)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    before = held(model) + sum(parameter.nbytes * 3 // 2 for parameter in trained)  # gradients, moments in 8 bits
    ids = torch.arange(512)[None]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, fit._as_on_gpu():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            count = torch.ones(())
            loss = model(input_ids=ids, position_ids=ids, labels=ids, counts=(count, count))["loss"]
        loss.backward()
    estimate = fit.estimate(config, AutoConfig.from_pretrained(config.model), 512, gpu=True)
    assert estimate.training == pytest.approx(before + peak(profiled), rel=0.05)


def test_what_a_table_of_embeddings_says_does_not_depend_on_where_it_is(saved):
    folder = saved("llama")
    ids = torch.randint(0, 4096, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, moved = load_base(folder).model, load_base(folder).model
    parameters = load_base(folder).parameters
    assert free_embeddings(moved) and "embed_tokens.weight" not in dict(moved.get_decoder().named_parameters())
    assert load.Base(folder, moved, None).parameters == parameters
    assert torch.equal(plain(input_ids=ids).logits, moved(input_ids=ids).logits)
    written = [model.generate(input_ids=ids, max_new_tokens=4, pad_token_id=0) for model in (plain, moved)]
    assert torch.equal(*written)


def test_a_head_that_shares_the_table_keeps_it(demo):
    shared = demo.model.get_input_embeddings().weight is demo.model.get_output_embeddings().weight
    assert bool(free_embeddings(demo.model)) != shared


def kdguard(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory) -> str:
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(folder)


def test_the_published_figure_of_another_tool_is_met(llama_8b):
    """torchtune tells 7.4 GiB for Llama 3.1 8B, 2 x 2,048 tokens, on an RTX 4090: rank 8, embeddings on the GPU."""
    setting = {"--max-length": 2048, "--micro-batch-size": 2, "--rank": 8, "--embeddings": "gpu", "--vram": "24GB"}
    flags = [str(word) for flag in setting.items() for word in flag]
    found = kdguard("fit", "--model", llama_8b, "--no-guard", *flags)
    assert found["total_gib"] == pytest.approx(7.4, rel=0.1)
    assert found["total_gib"] == pytest.approx(sum(line["gib"] for line in found["lines"]), abs=0.01)
    assert found["tokens_at_once"] == 4096


def test_longer_rows_fit_with_the_guard_than_others_publish_without_one(llama_8b):
    """Plain Hugging Face with FlashAttention 2, 8B, rank 32: 932 tokens on 12 GB, 5,789 on 24; Unsloth: 21,848."""
    config = TuneConfig(model=llama_8b, rank=32)
    rooms = [of_size(size).room * 2**30 for size in SIZES]
    plain = fit.longest(config, fit.config_of(config), rooms, gpu=True)
    assert plain == sorted(plain)
    assert all(length > other for length, other in zip(plain, (0, 932, 2551, 5789), strict=True))
    config = config.model_copy(update={"offload": True})
    assert fit.longest(config, fit.config_of(config), rooms[1:2], gpu=True)[0] > 21_848


def test_what_fits_fits_and_a_little_more_does_not(llama_8b):
    config = TuneConfig(model=llama_8b)
    of, room = fit.config_of(config), of_size(12).room * 2**30
    (length,) = fit.longest(config, of, [room], gpu=True)
    for share, fits in ((0.97, True), (1.03, False)):
        tokens = int(length * share)
        needs = fit.estimate(config.model_copy(update={"max_length": tokens}), of, tokens, gpu=True)
        assert (needs.total <= room) is fits


@pytest.mark.parametrize(("name", "size"), [("qwen2.5-7b", 8), ("gemma2-9b", 12), ("llama3.2-3b", 8)])
def test_a_preset_fits_the_card_that_it_says(name, size):
    config = resolve({"preset": name}, memory=lambda: float(size))
    chosen = presets()[name]["memory"][size]
    assert (config.max_length, config.rank) == (chosen["max_length"], chosen["rank"])
    needs = fit.estimate(config, fit.config_of(config), config.max_length, gpu=True)
    assert 0.8 * of_size(size).room < needs.total / 2**30 < of_size(size).room


def test_the_best_preset_that_fits_is_taken():
    assert resolve({}, memory=lambda: 23.6).preset == "qwen2.5-7b"
    assert resolve({}, memory=lambda: 7.6).preset == "qwen2.5-7b"
    assert resolve({}, memory=lambda: 7.6).rank < resolve({}, memory=lambda: 11.8).rank
    assert resolve({}, memory=lambda: 3.9).preset == "qwen2.5-1.5b"  # the smallest: nothing is said to fit
    assert resolve({"preset": "qwen2.5-7b", "rank": 8, "max_length": 99}, memory=lambda: 24.0).rank == 8
    assert by_memory({"memory": {8: {"rank": 1}, 12: {"rank": 2}}}, 11.5) == {"rank": 2}


def test_presets_are_listed_with_what_fits():
    found = kdguard("presets", "--vram", "8GB")
    assert {each["preset"]: each["longest"]["8"] for each in found}["gemma2-9b"] == 0
    assert kdguard("presets", "qwen2.5-7b")["model"] == "Qwen/Qwen2.5-7B-Instruct"
    done = CliRunner().invoke(app, ["presets", "qwen2.5-7"])
    assert isinstance(done.exception, InputError) and "qwen2.5-7b" in done.exception.hint


@pytest.mark.parametrize(
    ("text", "gb"), [("8GB", 8), ("8", 8), (" 11.5 gib ", 11.5), ("8192MB", 8), ("8g", 8), ("24576 MiB", 24)]
)
def test_sizes_are_read_as_people_write_them(text, gb):
    assert parse_size(text) == gb


@pytest.mark.parametrize("text", ["", "0", "eight", "-8GB", "8TB", "8GBs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="not a size"):
        parse_size(text)


def test_an_architecture_that_looks_at_its_data_is_not_guessed_at(monkeypatch):
    config = resolve({"model": "demo"})

    def asks(*args, **kwargs):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(fit, "estimate", asks)
    assert fit.needed_gib(config, fit.config_of(config), 64) is None
