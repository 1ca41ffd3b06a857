"""What would make a run's figures lie, put into whole runs: each is stopped, or told in words where people look."""

import json
import os
import re
import shutil

import pytest
import torch

from kdguard.config import TuneConfig
from kdguard.demo import MODEL
from kdguard.errors import InputError
from kdguard.events import Events, read_events
from kdguard.gpu import others
from kdguard.report.run import read_run
from kdguard.tuning import tune
from kdguard.ui.asking import Asker, Voice
from tests.model.test_fingerprint import other_template, other_weights
from tests.test_cli import DATA, kdguard
from tests.test_doctor import RTX_4090, nvidia_smi  # noqa: F401


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that learns nothing, on a base of its own and on probes of which the base knows a quarter."""
    folder = tmp_path_factory.mktemp("lies")
    shutil.copytree(MODEL, folder / "model")
    (folder / "facts.jsonl").write_text("".join(DATA.read_text().splitlines(keepends=True)[:40]))
    world = (DATA.parent.parent / "kdguard" / "probes" / "packs" / "world.jsonl").read_text().splitlines()[::20]
    probes = [json.loads(line) for line in world]
    for i, probe in enumerate(probes):
        if i % 4:
            probe["answers"] = ["nobody would say this"]
    (folder / "pack.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    flags = ("--model", folder / "model", "--probes", folder / "pack.jsonl", "--prompts", 1, "--epochs", 2)
    done = kdguard("tune", folder / "facts.jsonl", *flags, "--lr", 1e-9, "--out", folder / "run", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def folder(made, tmp_path):
    """The run and its base, at their own place again after each test."""
    kept = tmp_path / "kept"
    shutil.copytree(made[0] / "model", kept)
    yield made[0]
    shutil.rmtree(made[0] / "model")
    shutil.move(kept, made[0] / "model")


def test_few_known_probes_are_told_as_soon_as_the_base_was_asked(made):
    """Hours before the report: whoever wants other probes need not wait for it."""
    events = read_events(made[0] / "run" / "events.jsonl")
    kinds = [event["event"] for event in events]
    said = next(event["what"] for event in events if event["event"] == "warning")
    known, n = map(int, re.search(r"only (\d+) of (\d+) probes rightly", said).groups())
    asked = next(event for event in events if event["event"] == "answers" and event["of"] == "probes")
    assert (known, n) == (asked["correct"], asked["n"]) and known < n / 2
    assert kinds.index("warning") < kinds.index("loss")


def test_what_was_not_learned_is_told_everywhere(made):
    folder, done = made
    report = json.loads((folder / "run" / "report.json").read_text())
    few, nothing = report["warnings"]
    assert "probes rightly" in few and "more --epochs or a higher --lr" in nothing
    told = [event["what"] for event in read_events(folder / "run" / "events.jsonl") if event["event"] == "warning"]
    assert told == [few, nothing]
    shown = " ".join(done.stdout.split())
    assert shown.count(f"warning {few}") == 2 and shown.count(f"warning {nothing}") == 2  # at once, and at the end
    page, card = (folder / "run" / "report.html").read_text(), (folder / "run" / "adapter" / "README.md").read_text()
    assert page.count("Warning:") == 2 and card.count("Warning:") == 2


COMMANDS = {"dial": ("--steps", 1), "explain": (), "probe": ("--prompts", 1, "--samples", 0)}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_on_another_base_is_refused_wherever_it_is_loaded(folder, command):
    """Weights of the same shape load without a word, and every answer is one of a model that nobody trained."""
    other_weights(folder / "model")
    done = kdguard(command, folder / "run", *COMMANDS[command])
    assert done.returncode == 2, done.stdout + done.stderr
    first = done.stderr.splitlines()[0]
    assert first.endswith(f"not what {folder / 'run'} was trained on; other than then: the base's weights")
    assert f"kdguard tune --config {folder / 'run' / 'config.yaml'}" in done.stderr


def test_the_studio_refuses_another_chat_template(folder):
    run = read_run(folder / "run")
    assert next(iter(Asker().ask("Who?", [Voice(run, 1.0)])))
    other_template(folder / "model")
    with pytest.raises(InputError, match="other than then: the chat template"):
        next(iter(Asker().ask("Who?", [Voice(run, 1.0)])))


def test_another_quantisation_is_refused(folder):
    done = kdguard("probe", folder / "run", "--quant", "none", "--prompts", 1, "--samples", 0)
    assert done.returncode == 2 and "the quantisation (4bit nf4 double then, none now)" in done.stderr


def test_another_version_of_a_library_is_told_and_not_refused(folder):
    path = folder / "run" / "fingerprint.json"
    was = path.read_text()
    path.write_text(json.dumps({**json.loads(was), "peft": "0.1.0"}))
    done = kdguard("dial", folder / "run", "--steps", 1)
    path.write_text(was)
    assert done.returncode == 0, done.stderr
    assert "warning" in done.stdout and "peft (0.1.0 then" in " ".join(done.stdout.split())


@pytest.mark.skipif(os.name == "nt", reason="nvidia-smi is a shell script here")
def test_a_gpu_that_another_program_uses_is_told_before_the_base_is_loaded(nvidia_smi, tmp_path, monkeypatch):  # noqa: F811
    """Where the base does not fit beside it, nothing later would tell why."""
    apps = f"GPU-4090, 812, 6144, /usr/bin/game\\nGPU-4090, {os.getpid()}, 900, python\\nGPU-4090, 5, 60, panel\\n"
    nvidia_smi(RTX_4090, apps=apps + "GPU-other, 6, 9000, elsewhere\\n")
    assert others("GPU-4090") == ["game (process 812) holds 6.0 GiB of the GPU"]
    assert len(others()) == 2
    told: list = []
    config = TuneConfig(data=str(DATA), model="demo", out=tmp_path / "run")
    tune(config, Events(told.append), dry_run=True)
    assert not [event for event in told if event["event"] == "warning"]  # a run on the CPU is not hindered by it
    told.clear()
    monkeypatch.setattr("kdguard.tuning.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("kdguard.tuning.uuid", lambda: "GPU-4090")
    tune(config, Events(told.append), dry_run=True)
    kinds = [event["event"] for event in told]
    assert kinds.count("warning") == 1 and kinds.index("warning") < kinds.index("plan")
    said = told[kinds.index("warning")]["what"]
    assert said.startswith("game (process 812) holds 6.0 GiB of the GPU")


def test_what_is_warned_of_before_there_is_a_run_folder_comes_into_its_events(tmp_path):
    """The studio reads the file, and knows nothing of what was printed."""
    events = Events()
    events.emit("warning", what="early")
    events.path = tmp_path / "events.jsonl"
    events.emit("phase", name="train")
    assert [event["event"] for event in read_events(events.path)] == ["warning", "phase"]


@pytest.mark.skipif(os.name == "nt", reason="nvidia-smi is a shell script here")
def test_a_driver_that_does_not_answer_stops_no_run(nvidia_smi):  # noqa: F811
    nvidia_smi(script="exit 9\n")
    assert others() == []
