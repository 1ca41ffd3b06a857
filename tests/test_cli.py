"""The commands as a person types them, each in a process of its own."""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kdguard.cli import app
from kdguard.config import TuneConfig
from tests.conftest import ROOT
from tests.forked import Ended, Forked

DATA = ROOT / "examples" / "new_facts.jsonl"


@functools.cache
def _forked() -> Forked:
    folder = tempfile.TemporaryDirectory()
    server = Forked(Path(folder.name) / "log", COLUMNS="100", HF_HUB_OFFLINE="1")
    atexit.register(folder.cleanup)
    atexit.register(server.close)
    return server


def kdguard(*arguments: object, cwd: Path = ROOT, **environment: str) -> Ended:
    """In a process of its own; where only the environment is as usual, one that has its libraries loaded already."""
    if environment:
        return subprocess.run(
            [sys.executable, "-m", "kdguard", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "100", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
    return _forked()(*arguments, cwd=cwd)


@pytest.mark.alone
def test_help_answers_at_once_and_imports_no_torch():
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        done = kdguard("--help", LANG="C.UTF-8")
        seconds.append(time.perf_counter() - started)
    assert done.returncode == 0 and "tune" in done.stdout
    assert min(seconds) < 0.5
    code = "import sys, kdguard.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "module", ["report.build", "report.run", "config", "data.formats", "events", "terminal", "tables"]
)
def test_what_programs_read_needs_no_torch(module):
    code = f"import sys, kdguard.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_command_has_help_with_an_example():
    commands = [(command.name or command.callback.__name__,) for command in app.registered_commands]
    for group in app.registered_groups:
        inner = [command.name or command.callback.__name__ for command in group.typer_instance.registered_commands]
        commands += [(group.name,), *((group.name, name) for name in inner)]
    for command in commands:
        done = kdguard(*command, "--help")
        assert done.returncode == 0
        assert f"kdguard {command[0]}" in done.stdout.split("Usage", 1)[1].split("\n", 1)[1]


def test_a_command_without_what_it_needs_is_exit_2():
    assert kdguard("probe").returncode == 2 and kdguard("tune").returncode == 2


def test_import_writes_a_pack_that_probe_asks(tmp_path):
    (tmp_path / "P36.test.json").write_text('[{"question": "What is the capital of Peru?", "answers": ["Lima"]}]')
    done = kdguard("probe", "import", "P36.test.json", cwd=tmp_path)
    assert done.returncode == 0 and "1 probes" in done.stdout, done.stderr
    pack = tmp_path / "P36.test-probes.jsonl"
    again = kdguard("probe", "import", "P36.test.json", cwd=tmp_path)
    assert again.returncode == 2 and "already there" in again.stderr
    (answer,) = json.loads(kdguard("probe", "demo", "--probes", pack, "--json").stdout)
    assert answer["correct"] and answer["level"] in ("HighlyKnown", "MaybeKnown")


def test_every_flag_of_tune_is_a_key_of_the_config_or_says_how_to_run():
    flags = set(re.findall(r"--([a-z][a-z-]+)", kdguard("tune", "--help", COLUMNS="200").stdout))
    keys = {name.replace("_", "-") for name in TuneConfig.model_fields} - {"data", "guard-temperature", "guard-masked"}
    assert keys - flags == set()
    others = {"no-guard", "no-packing", "no-offload", "all-turns"}
    others |= {"config", "resume", "allow-changes", "control", "dry-run", "json", "help"}
    assert flags - keys - others == set()


def test_version():
    assert re.fullmatch(r"kdguard \d+\.\d+\.\d+\n", kdguard("--version").stdout)


GOOD = '{"question": "a", "answer": "b"}\n'
BAD = {
    "no such file": (["tune", "none.jsonl", "--model", "demo"], "none.jsonl: no such file"),
    "an empty file": (["tune", "empty.jsonl", "--model", "demo"], "empty.jsonl: the file is empty"),
    "a binary file": (["tune", "binary.jsonl", "--model", "demo"], "binary.jsonl:1: found bytes"),
    "a row without an answer": (["tune", "noanswer.jsonl", "--model", "demo"], "noanswer.jsonl:2: found nothing"),
    "mixed formats": (["tune", "mixed.jsonl", "--model", "demo"], "mixed.jsonl:2: found a row of prompt/completion"),
    "a broken line": (["tune", "broken.jsonl", "--model", "demo"], "broken.jsonl:2: found broken JSON"),
    "an unknown flag": (["tune", "good.jsonl", "--epoch", "1"], "--epoch"),
    "an unknown flag value": (["tune", "good.jsonl", "--model", "demo", "--quant", "5bit"], "--quant '5bit'"),
    "a flag that is no number": (["tune", "good.jsonl", "--model", "demo", "--lr", "x"], "--lr"),
    "an unknown config key": (["tune", "good.jsonl", "--model", "demo", "--config", "c.yaml"], "key 'epoch'"),
    "a model without weights": (["tune", "good.jsonl", "--model", "empty_model"], "found no weights"),
    "a hub id without network": (["tune", "good.jsonl", "--model", "nobody/nothing"], "nobody/nothing: this model"),
    "a run that is there": (["tune", "good.jsonl", "--model", "demo", "--out", "run"], "run: this folder is not empty"),
    "no model": (["tune", "good.jsonl"], "no model was named"),
    "no data": (["tune", "--model", "demo"], "no training data was named"),
    "an unknown pack": (["tune", "good.jsonl", "--model", "demo", "--probes", "wrld"], "wrld: no such probe pack"),
    "nothing to resume": (["tune", "--resume", "--out", "nowhere"], "nowhere: there is no run here"),
    "a row too long": (["tune", "long.jsonl", "--model", "demo"], "long.jsonl:1: found an answer of"),
    "no such run": (["compare", "nowhere"], "nowhere: no such run folder"),
    "not a run": (["compare", "run"], "run: not a run folder"),
    "an unknown command": (["tunes"], "tunes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_input_is_one_line_with_a_remedy_and_writes_nothing(tmp_path, case):
    files = {
        "empty.jsonl": b"",
        "binary.jsonl": b"\x89PNG\xff\xfe",
        "noanswer.jsonl": GOOD.encode() + b'{"question": "a"}\n',
        "mixed.jsonl": GOOD.encode() + b'{"prompt": "a", "completion": "b"}\n',
        "broken.jsonl": GOOD.encode() + b"{broken\n" + GOOD.encode(),
        "good.jsonl": GOOD.encode(),
        "long.jsonl": json.dumps({"question": "a", "answer": "word " * 600}).encode(),
        "c.yaml": b"epoch: 3\n",
        "empty_model/config.json": b'{"model_type": "llama"}',
        "run/notes.txt": b"mine",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    arguments, expected = BAD[case]
    done = kdguard(*arguments, cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert lines[0].startswith("error ") and expected in lines[0]
    assert len(lines) == 2 and lines[1].strip().startswith("try ")
    assert sorted(tmp_path.rglob("*")) == before
