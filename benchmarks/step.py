"""What the guard costs a training step: guard on over guard off, same rows, through the Trainer.

`python benchmarks/step.py` trains a Llama of random weights in NF4, whose output head has the share of its parameters
that Llama 3.1 8B's has, and writes `benchmarks/results/step-cpu.json` or `step-cuda.json`. Ratios are medians over
interleaved rounds of whole trainings; a live teacher answers on every step, a kept one on a row's first visit.
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
from kdguard.data.tokens import Collator, Row
from kdguard.guard.teacher import Guard
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model.load import add_adapter, compute_dtype, load_base, load_tokenizer

ROWS, TOKENS, BATCH = 32, 128, 8
MODES = {"guard off": (0.0, False), "live teacher": (6.0, False), "kept teacher": (6.0, True)}


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


def rows() -> list[Row]:
    """Random rows; the second half of each is its answer."""
    ids = torch.randint(10, 2000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    return [Row(row, [IGNORE] * (TOKENS // 2) + row[TOKENS // 2 :]) for row in ids]


def seconds(folder: Path, mode: str, *, checkpointing: bool, epochs: int) -> float:
    weight, keep = MODES[mode]
    set_seed(0)
    model = add_adapter(load_base(str(folder)), rank=16)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
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
            train_dataset=rows(),
            data_collator=Collator(0),
            guard=Guard(weight),
            keep_teacher=keep,
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for checkpointing in (False, True):
            times: dict[str, list[float]] = {mode: [] for mode in MODES}
            for _ in range(args.rounds):
                for mode in MODES:
                    took = seconds(Path(folder), mode, checkpointing=checkpointing, epochs=args.epochs)
                    times[mode].append(took)
            for mode in MODES:
                ratio = statistics.median(a / b for a, b in zip(times[mode], times["guard off"], strict=True))
                entry = {
                    "mode": mode,
                    "checkpointing": checkpointing,
                    "epochs": args.epochs,
                    "seconds": statistics.median(times[mode]),
                    "over_guard_off": ratio,
                }
                results.append(entry)
                print(
                    f"{mode:13} {'with' if checkpointing else 'no'} checkpointing  {args.epochs} epochs  "
                    f"{entry['seconds']:6.2f} s  {ratio:.2f} of guard off",
                    flush=True,
                )
    write(f"step-{'cuda' if torch.cuda.is_available() else 'cpu'}", results)


if __name__ == "__main__":
    main()
