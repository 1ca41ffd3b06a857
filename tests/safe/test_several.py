"""Several processes train as one does: the same steps, one run folder, and they stop together."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file

from kdguard.events import read_events
from kdguard.guard.checkpoint import last_whole
from tests.forked import ROOT
from tests.safe.conftest import ANSWERS, THOROUGH, half_written, losses, one_line

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

KDGUARD = "-m", "kdguard"
FSDP_ON_CPU = ("tests/safe/fsdp_on_cpu.py",)


def launch(engine: str, program: Sequence[str], *arguments: object) -> subprocess.CompletedProcess:
    """As people do, with the config in examples; port 0 is a free one."""
    launcher = ["accelerate.commands.launch", "--config_file", f"examples/accelerate/{engine}.yaml"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "--main_process_port", "0", *program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def assert_same_losses(run, other, within: float) -> None:
    ours, theirs = losses(run), losses(other)
    assert ours.keys() == theirs.keys()
    for step, (ce, kl, lr, _) in ours.items():
        assert (ce, kl, lr) == pytest.approx(theirs[step][:3], abs=within), step


@pytest.fixture(scope="module")
def two(small, tmp_path_factory):
    """The small run in two processes: its folder, and what they printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = launch("ddp", KDGUARD, "tune", *small.arguments, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_two_processes_have_the_losses_of_one(small, two):
    """N and M are counted over all processes, so each step has one gradient however its rows are shared out."""
    out, _ = two
    assert_same_losses(out, small.whole, 1e-5)
    adapter, alone = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, small.whole))
    torch.testing.assert_close(adapter, alone, rtol=0, atol=1e-5)


def test_only_the_main_process_writes_and_speaks(small, two):
    """Two that appended to one file, or printed, would do so twice."""
    out, stdout = two
    assert json.loads(stdout) == json.loads((out / "report.json").read_text())
    events = read_events(out / "events.jsonl")
    steps = [event["step"] for event in events if event["event"] == "loss"]
    assert steps == sorted(set(steps)) and sum(event["event"] == "process" for event in events) == 1
    assert not (out / ".lock").exists() and half_written(out) == []
    for name in ANSWERS:
        assert len((out / name).read_text().splitlines()) == len((small.whole / name).read_text().splitlines())


def test_two_processes_stop_after_the_same_step_and_go_on(small, two, tmp_path):
    """The signal reaches each at another moment; a checkpoint takes them both."""
    out = tmp_path / "run"
    done = small.tune(out, processes=2, signals=["train", int(signal.SIGTERM)])
    assert done.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in one_line(done)
    assert half_written(out) == [] and last_whole(out / "checkpoints")
    done = small.go_on(out, processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(two[0])
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (out, two[0])]
    assert adapters[0] == adapters[1]


def test_an_error_in_one_ends_both_and_one_process_can_go_on(small, tmp_path):
    """What the others meet then, such as a lost connection, is not told: it would hide the reason."""
    out = tmp_path / "run"
    done = small.tune(out, processes=2, no_memory_at=4)
    assert done.returncode == 1 and "memory ran out in process 1" in one_line(done)
    assert last_whole(out / "checkpoints").name == "checkpoint-3"
    done = small.go_on(out)
    assert done.returncode == 2 and "processes (2 then, 1 now)" in one_line(done)
    done = small.go_on(out, "--allow-changes")
    assert done.returncode == 0, done.stderr
    assert_same_losses(out, small.whole, 1e-5)


def test_a_step_that_cannot_be_shared_is_refused_once(small, tmp_path):
    """Unequal shares would weigh the rows of one process more than those of another."""
    done = small.tune(tmp_path / "run", "--batch-size", "9", processes=2)
    assert done.returncode == 2 and "--batch-size 10" in one_line(done)
    assert not (tmp_path / "run").exists()


def assert_spread_over_two_as_one(small, folder, engine: str, program: Sequence[str], within: float) -> None:
    arguments = [argument for argument in small.arguments if argument not in ("--budget", "20%")]
    alone = small.run("tune", *arguments, "--out", folder / "alone", cwd=folder)
    done = launch(engine, program, "tune", *arguments, "--out", folder / "run")
    assert (alone.returncode, done.returncode) == (0, 0), done.stderr
    assert_same_losses(folder / "run", folder / "alone", within)


@pytest.mark.skipif(not THOROUGH, reason="KDGUARD_THOROUGH is not set")
def test_weights_spread_over_two_processes_have_the_losses_of_one(small, tmp_path):
    """The teacher, the head outside its forward, and all questions need weights that no process has by itself."""
    assert_spread_over_two_as_one(small, tmp_path, "fsdp", FSDP_ON_CPU, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_gpus_have_the_losses_of_one(small, tmp_path, engine):
    """In 16 bits, and so within their rounding."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    assert_spread_over_two_as_one(small, tmp_path, engine, KDGUARD, 0.05)
