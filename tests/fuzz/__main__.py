"""`python -m tests.fuzz --inputs 100000 --seed 0`: fuzz every reader, print what was found."""

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kdguard.errors import KdguardError
from tests.conftest import SMALL, byte_tokenizer
from tests.fuzz.targets import check, targets

SECONDS = 10  # that an input may take
MEMORY = 2**30  # bytes that all of them together may take on top of what the libraries have


@dataclass
class Counted:
    """Of one target. `finds`: where a traceback comes from -> its text and the numbers of the inputs that made it."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    finds: dict[str, tuple[str, list[int]]] = field(default_factory=dict)


class TooLong(BaseException):
    """An input took more than SECONDS."""


def fuzz(inputs: int, seed: int, model: Path, folder: Path, only: str = "", first: int = 0) -> dict[str, Counted]:
    """Each target reads its share of the inputs. only: this target alone. first: the number of its first input.

    An input depends on the seed, its target and its number alone.
    """
    found = {}
    readers = {name: made for name, made in targets(folder, model).items() if only in ("", name)}
    whole, done, told = sum(share for _, share in readers.values()), 0, time.monotonic()
    began = told
    for name, (target, share) in readers.items():
        counted = found[name] = Counted()
        for number in range(first, first + inputs * share // whole):
            _one(target, name, number, seed, counted)
            done += 1
            if time.monotonic() - told > 5:
                told = time.monotonic()
                finds = sum(len(each.finds) for each in found.values())
                print(f"{done:,} of {inputs:,}  {name}  {done / (told - began):,.0f}/s  {finds} finds", file=sys.stderr)
    return found


def _one(target, name: str, number: int, seed: int, counted: Counted) -> None:
    began = time.perf_counter()
    counted.inputs += 1
    try:
        with _soon():
            counted.accepted += target(random.Random(f"{seed} {name} {number}"))
    except KdguardError as error:
        counted.refused += 1
        try:
            check(error)
        except AssertionError as wrong:
            _note(counted, wrong, number, f"a refusal that {wrong}: {error.message[:200]!r}")
    except (Exception, TooLong) as error:
        _note(counted, error, number, "")
    took = time.perf_counter() - began
    counted.seconds += took
    counted.slowest = max(counted.slowest, took)


def _note(counted: Counted, error: BaseException, number: int, what: str) -> None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/kdguard/" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "tests"
    key = f"{type(error).__name__} at {place}" if not what else f"refusal: {what[:60]}"
    text = what or "".join(traceback.format_exception(error)[-6:])
    counted.finds.setdefault(key, (text, []))[1].append(number)


@contextmanager
def _soon() -> Iterator[None]:
    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tiny_model(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="", help="one target alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to make a find again")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = tiny_model(folder / "model")
        targets(folder / "warm", model)  # what the libraries take by themselves
        before, began = peak(), time.monotonic()
        found = fuzz(asked.inputs, asked.seed, model, folder, asked.target, asked.first)
    print(f"{'target':10}{'inputs':>9}{'accepted':>10}{'refused':>9}{'finds':>7}{'inputs/s':>10}{'slowest s':>11}")
    for name, counted in found.items():
        pace = counted.inputs / counted.seconds if counted.seconds else 0
        print(
            f"{name:10}{counted.inputs:>9,}{counted.accepted:>10,}{counted.refused:>9,}{len(counted.finds):>7}"
            f"{pace:>10,.0f}{counted.slowest:>11.2f}"
        )
    grown = peak() - before
    total, seconds = sum(counted.inputs for counted in found.values()), time.monotonic() - began
    print(f"{total:,} inputs in {seconds:,.0f} s, {total / seconds:,.0f}/s; memory grew by {grown / 2**20:,.0f} MiB")
    finds = [(name, *find) for name, counted in found.items() for find in counted.finds.items()]
    for name, key, (text, numbers) in finds:
        print(f"\n{name}: {key}, {len(numbers)} times; --target {name} --inputs 1 --first {numbers[0]}\n{text}")
    if grown > MEMORY:
        print(f"memory grew by more than {MEMORY / 2**20:,.0f} MiB")
    return bool(finds) or grown > MEMORY


if __name__ == "__main__":
    sys.exit(main())
