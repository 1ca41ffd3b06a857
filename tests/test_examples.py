"""`examples/` from top to bottom: what its page says is printed is what is printed."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_cli import kdguard

PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
SHOWN = {
    command: printed.splitlines()
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S)
    for command, printed in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M)
}


@pytest.mark.parametrize("command", [command for command in SHOWN if command.startswith("kdguard")])
def test_a_command_prints_what_its_page_says(command):
    done = kdguard(*command.split()[1:])
    assert done.returncode == 0, done.stderr
    assert [line.rstrip() for line in done.stdout.splitlines()] == SHOWN[command]


def ran(command: str) -> tuple[list[int], list[int]]:
    """The numbers that a script prints, and those on the page; all the rest has to be the same."""
    done = subprocess.run(
        [sys.executable, *command.split()[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CI": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("{'")]  # the Trainer's own
    assert [re.sub(r"\d+", "N", line) for line in said] == [re.sub(r"\d+", "N", line) for line in SHOWN[command]]
    return tuple([int(n) for line in lines for n in re.findall(r"\d+", line)] for lines in (said, SHOWN[command]))


def test_the_guard_in_a_script_with_transformers():
    found, told = ran("python examples/guard_in_your_trainer.py")
    assert found == pytest.approx(told, abs=15)
    (_, learned, new, plain, old), (_, guarded_learned, _, guarded, _) = found[:5], found[5:]
    assert min(learned, guarded_learned) >= 0.9 * new
    assert plain < 0.8 * old and guarded > 0.95 * old


def test_the_guard_in_a_script_with_trl():
    if not importlib.util.find_spec("trl"):
        pytest.skip("TRL is not installed")
    (learned, new), _ = ran("python examples/guard_with_trl.py")
    assert learned >= 0.9 * new


def test_every_script_and_every_file_is_on_the_page():
    for path in (ROOT / "examples").iterdir():
        assert path.name == "README.md" or path.name.startswith("_") or f"]({path.name})" in PAGE, path.name
