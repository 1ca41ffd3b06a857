"""What the guard costs a training step: guard on over guard off, same rows, through the Trainer.

`python benchmarks/step.py` trains a Llama of random weights in NF4, whose output head has the share of its parameters
that Llama 3.1 8B's has, and writes `benchmarks/results/step-cpu.json` or `step-cuda.json`. Ratios are medians over
interleaved rounds of whole trainings; a live teacher answers on every step, a kept one on a row's first visit. Peak
memory is what torch's allocator holds at most, model and all, in an epoch and a step that are not timed.
`--short` trains on rows of 8 to 64 tokens instead, padded and packed, and writes `packing-cpu.json`.
"""

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from report import write
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from kdguard.data import IGNORE
from kdguard.data.batches import Collator, pack
from kdguard.data.tokens import Row
from kdguard.guard.teacher import Guard
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model.load import add_adapter, compute_dtype, load_base, load_tokenizer

ROWS, TOKENS, BATCH = 32, 128, 8
WEIGHT = 6.0


@dataclass(frozen=True)
class Mode:
    weight: float = 0.0
    keep: bool = True
    upper_half: bool = False
    at_once: int = BATCH  # rows in memory
    packing: int | None = None  # tokens


LONG = {
    "guard off": Mode(),
    "live teacher": Mode(WEIGHT, keep=False),
    "kept teacher": Mode(WEIGHT),
    "upper half, live teacher": Mode(WEIGHT, keep=False, upper_half=True),
    "upper half, kept teacher": Mode(WEIGHT, upper_half=True),
}
SHORT = {
    f"{guard}, {name}": Mode(weight, at_once=at_once, packing=packing)
    for guard, weight in (("guard off", 0.0), ("kept teacher", WEIGHT))
    for name, at_once, packing in (("padded by 2", 2, None), ("padded by 8", BATCH, None), ("packed", BATCH, 512))
}


def make_model(folder: Path) -> None:
    on_gpu = torch.cuda.is_available()
    hidden, layers, vocabulary = (2048, 12, 32_000) if on_gpu else (512, 8, 3_400)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=vocabulary,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(compute_dtype()).save_pretrained(folder)
    load_tokenizer("demo").save_pretrained(folder)


def rows(short: bool) -> list[Row]:
    """Random rows, `short` ones of different lengths; the second half of each is its answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 2000, (ROWS, TOKENS), generator=generator).tolist()
    lengths = torch.randint(8, TOKENS // 2 + 1, (ROWS,), generator=generator).tolist() if short else [TOKENS] * ROWS
    return [Row(row[:n], [IGNORE] * (n // 2) + row[n // 2 : n]) for row, n in zip(ids, lengths, strict=True)]


@contextmanager
def made(folder: Path, mode: Mode, *, short: bool, checkpointing: bool, epochs: int) -> Iterator[GuardedTrainer]:
    set_seed(0)
    model = add_adapter(load_base(str(folder)), rank=16, upper_half=mode.upper_half)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            num_train_epochs=epochs,
            per_device_train_batch_size=mode.at_once,
            gradient_accumulation_steps=BATCH // mode.at_once,
            learning_rate=1e-4,
            bf16=compute_dtype() is torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        trainer = GuardedTrainer(
            model,
            arguments,
            train_dataset=rows(short),
            data_collator=pack if mode.packing else Collator(0),
            guard=Guard(mode.weight),
            keep_teacher=mode.keep,
            packing=mode.packing,
        )
        trainer.remove_callback(PrinterCallback)
        yield trainer


def seconds(trainer: GuardedTrainer) -> float:
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def peak_mib(trainer: GuardedTrainer) -> float:
    """Of what torch's allocator holds while `trainer` trains for an epoch and a step."""
    gc.collect()  # the trainer before it
    trainer.args.max_steps = ROWS // BATCH + 1
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return torch.cuda.max_memory_allocated() / 2**20
    held = trainer.model.get_memory_footprint()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=held)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="short rows, padded and packed")
    args = parser.parse_args()
    modes, results = SHORT if args.short else LONG, []
    first = next(iter(modes))
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for checkpointing in (False, True):
            settings = {"short": args.short, "checkpointing": checkpointing, "epochs": args.epochs}
            times: dict[str, list[float]] = {mode: [] for mode in modes}
            memory: dict[str, float] = {}
            for mode, how in modes.items():
                with made(Path(folder), how, **settings) as trainer:
                    memory[mode] = peak_mib(trainer)
            for _ in range(args.rounds):
                for mode, how in modes.items():
                    with made(Path(folder), how, **settings) as trainer:
                        times[mode].append(seconds(trainer))
            for mode in modes:
                ratio = statistics.median(a / b for a, b in zip(times[mode], times[first], strict=True))
                entry = {
                    "mode": mode,
                    "checkpointing": checkpointing,
                    "epochs": args.epochs,
                    "seconds": statistics.median(times[mode]),
                    "over_guard_off": ratio,
                    "peak_mib": memory[mode],
                    "peak_over_guard_off": memory[mode] / memory[first],
                }
                results.append(entry)
                print(
                    f"{mode:25} {'with' if checkpointing else 'no'} checkpointing  {args.epochs} epochs  "
                    f"{entry['seconds']:6.2f} s  {ratio:.2f} of {first}  "
                    f"{entry['peak_mib']:,.0f} MiB  {entry['peak_over_guard_off']:.2f}",
                    flush=True,
                )
    write(f"{'packing' if args.short else 'step'}-{'cuda' if torch.cuda.is_available() else 'cpu'}", results)


if __name__ == "__main__":
    main()
