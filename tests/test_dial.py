"""The dial: strengths measured on a finished run, one of them written, scored on probes that did not steer."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM

from kdguard.demo import MODEL
from kdguard.model.strength import scale_saved_adapter
from kdguard.probes.watch import split
from kdguard.report.run import read_run
from tests.test_cli import DATA, kdguard


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A short run without the guard, which forgets much, on a few rows and probes."""
    folder = tmp_path_factory.mktemp("dial")
    data = folder / "facts.jsonl"
    data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:40]))
    pack = folder / "pack.jsonl"
    world = (DATA.parent.parent / "kdguard" / "probes" / "packs" / "world.jsonl").read_text().splitlines(keepends=True)
    pack.write_text("".join(world[::10]))
    out = folder / "run"
    flags = ("--model", "demo", "--no-guard", "--epochs", 6, "--probes", pack, "--prompts", 1, "--out", out)
    done = kdguard("tune", data, *flags)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def run(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "run")


def test_without_a_choice_it_only_measures(run):
    before = (run / "report.json").read_bytes(), (run / "adapter" / "adapter_model.safetensors").read_bytes()
    done = kdguard("dial", run, "--steps", 2, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["chosen"] is None
    start, _, end = said["points"]
    report = read_run(run).report
    assert (start["strength"], start["forgotten"]) == (0, 0)
    assert (end["strength"], end["forgotten"], end["learned"]) == (
        1,
        report["kept"]["forgotten"],
        report["learned"]["after"],
    )
    assert before == ((run / "report.json").read_bytes(), (run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert json.loads((run / "dial.json").read_text()) == said["points"]
    assert "strength of the adapter" in (run / "report.html").read_text()


def test_a_budget_is_chosen_on_watched_probes_and_reported_on_the_others(run):
    before = read_run(run)
    done = kdguard("dial", run, "--budget", "5%", "--steps", 10, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    after = read_run(run)
    chosen = next(point for point in said["points"] if point["strength"] == said["chosen"])
    allowed = after.report["budget"]["allowed"]
    assert 0 < said["chosen"] < 1 and chosen["watched_forgotten"] <= allowed
    assert all(
        point["watched_forgotten"] > allowed or point["learned"] <= chosen["learned"] for point in said["points"][1:]
    )
    watched, scored = split([pair.before.id for pair in before.probes], before.config["seed"], 0.05)
    assert [pair.before.id for pair in after.probes] == scored
    assert [pair.before.id for pair in after.watched] == watched
    assert after.report["strength"] == said["chosen"]
    assert after.report["kept"]["forgotten"] == chosen["forgotten"]
    once = ("--prompts", 1, "--samples", 0, "--json")
    probed = kdguard("probe", run, "--probes", before.config["probes"][0], *once)
    answers = {row["id"]: row["answer"] for row in json.loads(probed.stdout)}
    assert all(answers[pair.before.id] == pair.after.answer for pair in after.probes)


def test_a_budget_that_no_strength_keeps_is_exit_3_and_writes_nothing(run):
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    done = kdguard("dial", run, "--budget", "0%", "--steps", 1)
    assert done.returncode == 3 and "no strength keeps the budget" in done.stderr
    assert before == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert read_run(run).report["strength"] == 1


def test_a_strength_that_is_none_is_refused(run):
    for strength in ("0", "1.5"):
        done = kdguard("dial", run, "--strength", strength)
        assert done.returncode == 2 and "strength" in done.stderr


def test_the_written_strength_is_that_of_the_scale_and_alpha_stays_whole(run):
    """Exporters need a whole lora_alpha, so the strength goes into B."""

    def loaded() -> PeftModel:
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), run / "adapter"
        ).eval()

    ids = torch.arange(300, 320)[None]
    with torch.no_grad(), rescale_adapter_scale(whole := loaded(), 0.35):
        wanted = whole(ids).logits
    scale_saved_adapter(run / "adapter", 0.35)
    with torch.no_grad():
        torch.testing.assert_close(loaded()(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and isinstance(config["lora_alpha"], int)
