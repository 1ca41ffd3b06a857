"""A short run on the embedded model, to be exported; and llama.cpp, where there is one."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_cli import DATA, kdguard


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run on a few rows and probes, at a dialled strength."""
    folder = tmp_path_factory.mktemp("export")
    data = folder / "facts.jsonl"
    data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:40]))
    pack = folder / "pack.jsonl"
    packs = ROOT / "kdguard" / "probes" / "packs"
    lines = [(packs / f"{name}.jsonl").read_text().splitlines(keepends=True) for name in ("world", "common")]
    choices = [line for line in lines[1] if '"choices"' in line]
    pack.write_text("".join(lines[0][::20] + choices[:4]))
    out = folder / "run"
    flags = ("--model", "demo", "--no-guard", "--epochs", 6, "--probes", pack, "--prompts", 1, "--out", out)
    done = kdguard("tune", data, *flags)
    assert done.returncode == 0, done.stderr
    done = kdguard("dial", out, "--strength", 0.8, "--steps", 1)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder of llama.cpp's converters: what LLAMA_CPP names, or where PATH has them."""
    found = os.environ.get("LLAMA_CPP") or shutil.which("convert_hf_to_gguf.py")
    if not found:
        pytest.skip("there is no llama.cpp: set LLAMA_CPP to its folder, such as vendor/llama.cpp of llama-cpp-python")
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("there is no llama-cpp-python: pip install llama-cpp-python")
    return Path(found) if Path(found).is_dir() else Path(found).resolve().parent
