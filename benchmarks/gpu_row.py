"""One row of `benchmarks/gpu.py`: a network of random weights, quantised on the device, trained for a few steps."""

import gc
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bare
import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig
from report import machine
from torch import nn
from transformers import (
    AutoConfig,
    DataCollatorWithFlattening,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from kdguard import fit
from kdguard.config import TuneConfig, presets
from kdguard.errors import OutOfMemory
from kdguard.guard.lean import Lean
from kdguard.guard.teacher import Guard
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model.embedding import free_embeddings
from kdguard.model.empty import network
from kdguard.model.load import Base, add_adapter, base_view, compute_dtype, device, load_tokenizer
from kdguard.model.memory import ran_out
from kdguard.training import training_arguments

ROWS = 2  # of a step, each a micro-batch of its own: gradients wait for the second, as in any step of several
STD = 0.02  # of random weights, as before a pretraining: what comes out stays finite in 16 bits
SECONDS = 2.0  # that are timed, and one step at least
WARM_UP = 2  # steps that are not timed
LONG = 2.0, 10.0  # seconds of the first step from which on it is one less, and another
EPOCHS = 100_000  # the clock ends the training
GIB = 2**30

Row = dict[str, Any]


def about() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "machine": machine(),
        "gpu": gpu,
        "can_offload": bare.CAN_OFFLOAD,
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / GIB if gpu else None,
        **bare.versions(),
    }


def shape(model: str, tiny: bool) -> PretrainedConfig:
    """The config of a preset's model; `tiny` is a network in its likeness for a CPU."""
    values = presets()[model]["shape"]
    if tiny:
        small = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
        values = {
            **values,
            **small,
            "intermediate_size": values["intermediate_size"] // 32,
            "vocab_size": values["vocab_size"] // 64,
        }
    return AutoConfig.for_model(**values)


def config_of(row: Row) -> TuneConfig:
    """The settings with which `kdguard tune` would do what `row` does; rehearsal rows are rows like any other."""
    return TuneConfig(
        model=row["model"],
        guard="guard on" in row["what"] or "upper half" in row["what"],
        layers="upper-half" if "upper half" in row["what"] else "all",
        offload="offload" in row["what"],
        rank=row["rank"],
        max_length=row["length"],
        batch_size=ROWS,
        rehearsal=0.0,
        epochs=EPOCHS,
        lr=1e-4,
    )


def estimate(row: Row, tiny: bool) -> Row:
    """What `fit` tells of the training that a row measures, and of a whole run, which also answers probes."""
    config = config_of(row)
    alone = config.model_copy(update={"max_length": row["length"] - 1})  # a row that fills its pack, without a mask
    needs = fit.estimate(alone, shape(row["model"], tiny), row["length"], gpu=not tiny)
    return {"estimate_gib": needs.training / GIB, "estimate_with_answers_gib": needs.total / GIB}


def longest(row: Row, caps: list[float]) -> list[int]:
    """The longest rows that `fit` tells to be within each of `caps` GiB."""
    config = config_of({**row, "length": 1024})
    return fit.longest(config, shape(row["model"], False), [cap * GIB for cap in caps], gpu=True)


def random_base(config: PretrainedConfig, quant: str, *, free: bool) -> PreTrainedModel:
    """The network with random weights, filled and quantised layer by layer on the device.

    free: keep the table of input embeddings in the computer's memory, as a quantised model on a GPU has it.
    """
    dtype = compute_dtype()
    model = network(config, quant=quant, dtype=dtype)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            linear = isinstance(module, bnb.nn.Linear4bit) and name == "weight"
            made = torch.empty(parameter.shape, dtype=dtype, device=device())
            if parameter.ndim > 1:
                made.normal_(std=STD)
            else:
                made.fill_(float(name == "weight"))  # norms are 1, biases 0
            if linear:
                module._parameters[name] = bnb.nn.Params4bit(made, False, **vars(parameter)).to(device())
            else:
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as load_base has it
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):
            with device():
                model.set_submodule(name, type(module)(config))
    model.tie_weights()
    left = [name for name, held in itertools.chain(model.named_parameters(), model.named_buffers()) if held.is_meta]
    if left:
        raise RuntimeError(f"{', '.join(left[:3])} of {config.model_type} would have no data")
    if free:
        free_embeddings(model)
    return model


class Clock(TrainerCallback):
    """Tells when a step ends, and stops once enough were timed.

    seconds: enough. least: steps that are not timed however long they are.
    """

    def __init__(self, seconds: float, least: int = 0) -> None:
        self.seconds, self.least, self.ends = seconds, least, [time.perf_counter()]

    def tick(self) -> bool:
        """A step has ended; whether it was the last."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        return bool(self.timed) and sum(self.timed) >= self.seconds

    @property
    def timed(self) -> list[float]:
        """Seconds of each step after the warm-up."""
        every = [end - begin for begin, end in itertools.pairwise(self.ends)]
        warm_up = WARM_UP - sum(every[:1] >= [long] for long in LONG)
        return every[max(self.least, warm_up) :]

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.tick()


def data(config: PretrainedConfig, length: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, config.vocab_size, (ROWS, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def ours(base: PreTrainedModel, row: Row, config: TuneConfig, folder: Path, clock: Clock) -> Row:
    """kdguard's own trainer with the arguments of a run; rows are packed, one a pack."""
    model = add_adapter(Base(config.model, base, None), rank=config.rank, upper_half=config.layers == "upper-half")
    arguments = training_arguments(config, folder)
    arguments.save_strategy = "no"
    done: list[str] = []
    trainer = GuardedTrainer(
        model,
        arguments,
        train_dataset=data(base.config, config.max_length),
        data_collator=DataCollatorWithFlattening(),
        guard=Guard(config.guard_weight if config.guard else 0.0),
        keep_teacher="kept" in row["what"],
        packing=config.pack_tokens,
        callbacks=[clock],
        lean=Lean(offload=config.offload),
        on_step_down=lambda what, step: done.append(what),
    )
    trainer.train()
    return {"loss": last_loss(trainer), "less_memory_by": done, **paged(trainer.optimizer)}


def plain(base: PreTrainedModel, row: Row, config: TuneConfig, folder: Path, clock: Clock) -> Row:
    """transformers' own Trainer, with the model's own loss."""
    arguments = training_arguments(config, folder)
    arguments.save_strategy = "no"
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = 1, ROWS
    trainer = Trainer(
        add_adapter(Base(config.model, base, None), rank=config.rank),
        arguments,
        train_dataset=data(base.config, config.max_length),
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    trainer.train()
    return {"loss": last_loss(trainer), **paged(trainer.optimizer)}


def sft(base: PreTrainedModel, row: Row, config: TuneConfig, folder: Path, clock: Clock) -> Row:
    """TRL's SFTTrainer, QLoRA by its own means."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    on_gpu = device().type == "cuda"
    trainer = SFTTrainer(
        base,
        SFTConfig(
            output_dir=str(folder),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ROWS,
            learning_rate=config.lr,
            max_length=config.max_length,
            optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=on_gpu,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(data(base.config, config.max_length)),
        processing_class=load_tokenizer("demo"),
        peft_config=LoraConfig(
            r=config.rank, lora_alpha=config.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.train()
    return {"loss": last_loss(trainer), **paged(trainer.optimizer)}


def naive(base: PreTrainedModel, row: Row, config: TuneConfig, folder: Path, clock: Clock) -> Row:
    """Plain PyTorch: the whole logits of teacher and student, KL over the vocabulary beside the cross-entropy."""
    on_gpu = device().type == "cuda"
    model = add_adapter(Base(config.model, base, None), rank=config.rank)
    if on_gpu:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = (bnb.optim.PagedAdamW8bit if on_gpu else torch.optim.AdamW)(weights, lr=config.lr)
    rows = [
        {name: torch.tensor([ids], device=device()) for name, ids in row.items()}
        for row in data(base.config, config.max_length)
    ]
    clock.on_train_begin(None, None, None)
    ended = False
    while not ended:
        for each in rows:
            ids, labels = each["input_ids"], each["labels"][0, 1:]
            with torch.autocast("cuda", compute_dtype(), enabled=on_gpu):
                with base_view(model):
                    teacher = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                student = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
                loss = (F.cross_entropy(student, labels) + config.guard_weight * kl) / ROWS
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ended = clock.tick()
    return {"loss": loss.item() * ROWS, **paged(optimizer)}


def last_loss(trainer: Trainer) -> float:
    return next(logged["loss"] for logged in reversed(trainer.state.log_history) if "loss" in logged)


def paged(optimizer: Any) -> Row:
    """What the optimiser has in CUDA's unified memory, which the allocator does not count and a cap does not cover."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    held = [each for state in states for each in state.values() if getattr(each, "is_paged", False)]
    return {"paged_gib": sum(each.nbytes for each in held) / GIB}


METHODS = {
    "TRL SFTTrainer": sft,
    "transformers Trainer": plain,
    "naive teacher": naive,
}


def storages(model: nn.Module) -> Iterator[torch.UntypedStorage]:
    """All that a model holds, the constants of quantised weights included."""
    for held in itertools.chain(model.parameters(), model.buffers()):
        yield held.untyped_storage()
        state = getattr(held, "quant_state", None)
        while state is not None:
            yield from (each.untyped_storage() for each in vars(state).values() if isinstance(each, torch.Tensor))
            state = state.state2


def prepare(row: Row, tiny: bool) -> Callable[[], Row]:
    """All that can be done before the GPU is free -> the measuring of the row."""
    config, of = config_of(row), shape(row["model"], tiny)
    method = METHODS.get(row["what"], ours)
    set_seed(0)

    def measure() -> Row:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            # A worker of `--tiny` measures several rows.
            torch.cuda.set_per_process_memory_fraction(min(1.0, row["cap_gib"] * GIB / total) if row["cap_gib"] else 1)
        base = random_base(of, "4bit", free=method is ours and on_gpu)
        clock = Clock(
            0.0 if tiny else SECONDS, least=int("kept" in row["what"])
        )  # a row's first visit keeps its states
        gc.collect()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                found = method(base, row, config, Path(folder), clock)
                found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
                found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
            else:
                held = sum({storage.data_ptr(): storage.nbytes() for storage in storages(base)}.values())
                with torch.profiler.profile(profile_memory=True) as profile:
                    found = method(base, row, config, Path(folder), clock)
                events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
                events.sort(key=lambda event: event.start_ns())
                peak = max(itertools.accumulate((event.nbytes() for event in events), initial=held))
                found["peak_allocated_gib"] = peak / GIB
        seconds = statistics.median(clock.timed)
        return {
            "status": "ok",
            **found,
            "loss_finite": math.isfinite(found["loss"]),
            "steps_timed": len(clock.timed),
            "seconds_per_step": seconds,
            "tokens_per_second": ROWS * config.max_length / seconds,
        }

    return measure


def serve(pipe: Any, tiny: bool) -> None:
    """Answer what is asked through `pipe` until nobody is there any more."""
    gc.freeze()  # what was imported is not looked through again
    questions = {"about": about, "estimate": estimate, "longest": longest}
    while True:
        try:
            question, *arguments = pipe.recv()
            if question != "measure":
                pipe.send(questions[question](*arguments))
                continue
            measure = prepare(arguments[0], tiny)
            pipe.recv()  # the word to go
            pipe.send(measure())
        except (EOFError, BrokenPipeError):
            return
        except Exception as error:
            short = ran_out(error) or isinstance(error, OutOfMemory)
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            pipe.send({"status": "out of memory" if short else "failed", "reason": said})
            if question == "measure":
                return  # whatever it has left in memory
