"""A small run, how it ends when nothing happens to it, and a process that runs it while something does."""

import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdguard.events import read_events
from kdguard.probes.packs import PACKS
from tests.forked import Ended, Forked
from tests.test_cli import DATA

FLAGS = "--model demo --epochs 3 --batch-size 8 --rank 8 --budget 20% --prompts 1"
THOROUGH = "KDGUARD_THOROUGH" in os.environ  # all cases; else the same few of them


def some(cases: Sequence[Any], n: int) -> Sequence[Any]:
    """In CI a few of many cases, which take seconds each."""
    return cases if THOROUGH else random.Random(0).sample(cases, n)


@dataclass
class Small:
    """A run of nine steps over three epochs, watched by a budget."""

    arguments: list[str]
    run: Forked
    whole: Path  # that nothing has happened to
    probes: Path
    ended: Ended | None = None
    seconds: float = 0.0

    def tune(self, out: Path, *more: str, **harm: Any) -> Ended:
        return self.run("tune", *self.arguments, "--out", out, *more, cwd=out.parent, out=str(out), **harm)

    def go_on(self, out: Path, *more: str, **harm: Any) -> Ended:
        """As a person would: what has begun is resumed, what has not is begun."""
        if not (out / "config.yaml").exists():
            return self.tune(out, *more, **harm)
        return self.run("tune", "--resume", "--out", out, *more, cwd=out.parent, out=str(out), **harm)

    def assert_same_end(self, out: Path) -> None:
        """The adapter to the byte, the losses to the bit, and every answer."""
        for name in ("adapter/adapter_model.safetensors", *ANSWERS):
            assert (out / name).read_bytes() == (self.whole / name).read_bytes(), name
        assert losses(out) == losses(self.whole)
        assert half_written(out) == []


ANSWERS = [f"{of}/{when}.jsonl" for of in ("probes", "new", "watched") for when in ("before", "after")]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Iterator[Small]:
    folder = tmp_path_factory.mktemp("small")
    run = Forked(folder / "log", OMP_NUM_THREADS="1", COLUMNS="200")
    data, probes = folder / "facts.jsonl", folder / "probes.jsonl"
    data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:24]))
    probes.write_text("".join((PACKS / "world.jsonl").read_text().splitlines(keepends=True)[::60]))
    small = Small([str(data), *FLAGS.split(), "--probes", str(probes)], run, folder / "whole", probes)
    began = time.perf_counter()
    small.ended = small.tune(small.whole)
    small.seconds = time.perf_counter() - began
    assert small.ended.returncode == 0, small.ended.stderr
    yield small
    run.close()


def losses(run: Path) -> dict[int, tuple[float, ...]]:
    """By step; what was told last of a step counts."""
    told = (event for event in read_events(run / "events.jsonl") if event["event"] == "loss")
    return {event["step"]: (event["ce"], event["kl"], event["lr"], event["grad_norm"]) for event in told}


def half_written(run: Path) -> list[str]:
    """What should be gone by the end of a process that could still do something."""
    ends = ".part", ".old", ".writing", ".room"
    return [str(path.relative_to(run)) for path in run.rglob("*") if path.name.endswith(ends)]


def one_line(ended: Ended) -> str:
    """The error of a process that says one, and the next thing to type; never a traceback."""
    told = [line for line in ended.stderr.splitlines() if line.startswith(("error", "  try", "Traceback"))]
    assert [line.split()[0] for line in told] == ["error", "try"], ended.stderr
    return "\n".join(told)
