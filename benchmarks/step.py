"""What the guard costs a training step: guard on over guard off, same rows, through the Trainer.

`python benchmarks/step.py` trains a Llama of random weights in NF4, whose output head has the share of its parameters
that Llama 3.1 8B's has, and writes `benchmarks/results/step-cpu.json` or `step-cuda.json`. Ratios are medians over
interleaved rounds of whole trainings; a live teacher answers on every step, a kept one on a row's first visit.
`--short` trains on rows of 8 to 64 tokens instead, padded and packed, and writes `packing-cpu.json`.
"""

import argparse
import statistics
import tempfile
import time
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
# Weight of the guard, whether states are kept, rows in memory at once, and tokens of a pack.
LONG = {
    "guard off": (0.0, False, BATCH, None),
    "live teacher": (6.0, False, BATCH, None),
    "kept teacher": (6.0, True, BATCH, None),
}
SHORT = {
    f"{guard}, {name}": (weight, True, *how)
    for guard, weight in (("guard off", 0.0), ("kept teacher", 6.0))
    for name, how in {"padded by 2": (2, None), "padded by 8": (BATCH, None), "packed": (BATCH, 512)}.items()
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


def seconds(folder: Path, mode: str, *, short: bool, checkpointing: bool, epochs: int) -> float:
    weight, keep, at_once, packing = (SHORT if short else LONG)[mode]
    set_seed(0)
    model = add_adapter(load_base(str(folder)), rank=16)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            num_train_epochs=epochs,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=BATCH // at_once,
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
            data_collator=pack if packing else Collator(0),
            guard=Guard(weight),
            keep_teacher=keep,
            packing=packing,
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


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
            times: dict[str, list[float]] = {mode: [] for mode in modes}
            for _ in range(args.rounds):
                for mode in modes:
                    took = seconds(
                        Path(folder), mode, short=args.short, checkpointing=checkpointing, epochs=args.epochs
                    )
                    times[mode].append(took)
            for mode in modes:
                ratio = statistics.median(a / b for a, b in zip(times[mode], times[first], strict=True))
                entry = {
                    "mode": mode,
                    "checkpointing": checkpointing,
                    "epochs": args.epochs,
                    "seconds": statistics.median(times[mode]),
                    "over_guard_off": ratio,
                }
                results.append(entry)
                print(
                    f"{mode:25} {'with' if checkpointing else 'no'} checkpointing  {args.epochs} epochs  "
                    f"{entry['seconds']:6.2f} s  {ratio:.2f} of {first}",
                    flush=True,
                )
    write(f"{'packing' if args.short else 'step'}-{'cuda' if torch.cuda.is_available() else 'cpu'}", results)


if __name__ == "__main__":
    main()
