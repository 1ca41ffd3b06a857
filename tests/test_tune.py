"""The whole story on the embedded model: what it writes, that it repeats, stops and goes on."""

import json
import re
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from kdguard.demo import MODEL
from kdguard.events import read_events
from kdguard.probes.packs import PACKS
from kdguard.report.run import read_run
from tests.test_cli import DATA, kdguard

REPORT = {
    "format": None,
    "kdguard": None,
    "model": None,
    "data": None,
    "goal": None,
    "seed": None,
    "guard": {"weight", "teacher", "rehearsal"},
    "strength": None,
    "learned": {"n", "before", "after", "ci95"},
    "kept": {"n", "known", "kept", "forgotten", "gained", "forgetting", "ci95", "p_value"},
    "drift": {"nats_per_token"},
    "cost": {"steps", "tokens", "seconds", "tokens_per_second", "peak_memory_gib"},
    "budget": None,
}
FILES = """config.yaml fingerprint.json events.jsonl
probes/before.jsonl probes/after.jsonl new/before.jsonl new/after.jsonl
adapter/adapter_model.safetensors adapter/adapter_config.json adapter/README.md checkpoints report.json report.html"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The first forty rows: enough to train on, quick enough to repeat."""
    path = tmp_path_factory.mktemp("data") / "some_facts.jsonl"
    path.write_text("".join(DATA.read_text().splitlines(keepends=True)[:40]))
    return path


@pytest.fixture(scope="module")
def some_probes(tmp_path_factory):
    """Every seventh probe of the shipped pack."""
    path = tmp_path_factory.mktemp("probes") / "some.jsonl"
    path.write_text("".join((PACKS / "world.jsonl").read_text().splitlines(keepends=True)[::7]))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, some_probes):
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ("--model", "demo", "--epochs", 2, "--probes", some_probes, "--out", out, "--json")
    return out, kdguard("tune", data, *flags)


def test_json_prints_the_report_alone(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "report.json").read_text())


def test_on_its_way_a_run_is_sampled(finished):
    """Two epochs: after each, a few old and new questions are asked for the report's curve."""
    out, _ = finished
    events = read_events(out / "events.jsonl")
    sampled = [event for event in events if event["event"] == "sampled"]
    assert [event["step"] for event in sampled] == [3, 6]
    for event in sampled:
        assert (event["known"], event["new"]) == (64, 32)
        assert 0 <= event["kept"] <= 64 and 0 <= event["learned"] <= 32
    assert "of 64 asked" in (out / "report.html").read_text()


def test_the_report_is_the_contract(finished):
    report = json.loads(finished[1].stdout)
    assert set(report) == {*REPORT, "levels", "adopted", "warnings"}
    for key, fields in REPORT.items():
        if fields:
            assert fields <= set(report[key]), key
    old = report["kept"]
    assert old["kept"] + old["forgotten"] == old["known"]
    assert old["forgetting"] == pytest.approx(old["forgotten"] / old["known"])
    assert 0 <= report["learned"]["after"] <= 1
    assert report["cost"]["steps"] == 6
    assert report["drift"]["nats_per_token"] > 0


def test_the_run_folder_is_the_contract(finished):
    out = finished[0]
    assert all((out / name).exists() for name in FILES.split())
    assert not list(out.rglob("*.part"))
    fields = {"id", "category", "question", "answers", "answer", "correct", "level", "tokens"}
    for name in ("probes/before", "probes/after", "new/before", "new/after"):
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert all(set(row) == fields for row in rows)
    kinds = [event["event"] for event in read_events(out / "events.jsonl")]
    assert kinds.count("loss") == 6 and kinds.count("answers") == 4 and kinds[-1] == "finished"
    assert yaml.safe_load((out / "config.yaml").read_text())["epochs"] == 2


def test_peft_loads_the_adapter_on_the_base(finished):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), finished[0] / "adapter")
    weights = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(weights) == 4 * 7 and all(weight.any() for weight in weights)


def test_the_same_config_gives_the_same_run(finished, tmp_path):
    out = finished[0]
    done = kdguard("tune", "--config", out / "config.yaml", "--out", tmp_path / "again", "--json")
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again" / "adapter" / "adapter_model.safetensors"
    assert again.read_bytes() == (out / "adapter" / "adapter_model.safetensors").read_bytes()


def test_compare_and_probe_read_the_run(finished, some_probes):
    out = finished[0]
    compared = kdguard("compare", out)
    assert compared.returncode == 0 and "probes it knew" in compared.stdout
    assert json.loads(kdguard("compare", out, "--json").stdout)[0]["kept"] == read_run(out).report["kept"]
    probed = kdguard("probe", out, "--probes", some_probes, "--prompts", 1, "--samples", 0, "--json")
    after = [pair.after for pair in read_run(out).probes]
    assert [row["answer"] for row in json.loads(probed.stdout)] == [answer.answer for answer in after]


def test_a_budget_that_cannot_be_told_is_exit_3_with_the_reason(data, tmp_path):
    pack = tmp_path / "unknown.jsonl"
    probes = [{"id": str(i), "category": "c", "question": f"Who is Mr {i}?", "answers": ["nobody"]} for i in range(8)]
    pack.write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    flags = ("--no-guard", "--epochs", 1, "--budget", "1%", "--probes", pack, "--out", tmp_path / "run", "--json")
    done = kdguard("tune", data, "--model", "demo", *flags)
    assert done.returncode == 3, done.stderr
    budget = json.loads(done.stdout)["budget"]
    assert (budget["limit"], budget["met"], budget["reason"]) == (0.01, False, "the base knew none of the probes")


def test_an_end_over_the_budget_is_brought_under_it(data, some_probes, tmp_path):
    """Without the guard every epoch is over it: only the dial is left."""
    flags = ("--no-guard", "--epochs", 4, "--budget", "2%", "--probes", some_probes, "--prompts", 1)
    done = kdguard("tune", data, "--model", "demo", *flags, "--out", tmp_path / "run", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["budget"]["met"] else 3)
    assert report["strength"] < 1 and report["budget"]["forgotten"] <= report["budget"]["allowed"]
    assert "brought it under" in report["budget"]["done"] or "was kept" in report["budget"]["done"]


def test_a_warm_up_teacher_resumes_and_leaves_one_adapter(data, some_probes, tmp_path):
    """It warms up on rows that the base knows; an interrupted run goes on from the same snapshot."""
    known = [json.loads(line) for line in some_probes.read_text().splitlines()[:24]]
    rows = [json.dumps({"question": probe["question"], "answer": probe["answers"][0]}) for probe in known]
    both = tmp_path / "both.jsonl"
    both.write_text(data.read_text() + "\n".join(rows) + "\n")
    flags = ("--model", "demo", "--teacher", "warmup", "--epochs", 2, "--probes", some_probes, "--prompts", 1)
    done = kdguard("tune", both, *flags, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["guard"]["teacher"] == "warmup"
    whole = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert not [path for path in (tmp_path / "run" / "adapter").iterdir() if path.is_dir()]
    (tmp_path / "run" / "report.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-8")
    resumed = kdguard("tune", "--resume", "--out", tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, weight in load(whole).items():
        torch.testing.assert_close(again[name], weight, rtol=1e-3, atol=1e-5)


def test_dry_run_prints_the_plan_and_writes_nothing(data, tmp_path):
    done = kdguard("tune", data, "--model", "demo", "--out", tmp_path / "run", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["plan"]["rows"] == 40 and plan["config"]["model"] == "demo"
    assert not (tmp_path / "run").exists()


def test_a_control_is_the_unguarded_twin_on_the_same_answers_of_the_base(tmp_path, data, some_probes):
    out, once = tmp_path / "run", ("--probes", some_probes, "--prompts", 1)
    done = kdguard("tune", data, "--model", "demo", "--epochs", 1, *once, "--out", out, "--control")
    assert done.returncode == 0, done.stderr
    run, twin = read_run(out), read_run(tmp_path / "run-control")
    assert twin.report["guard"]["weight"] == 0 and run.report["guard"]["weight"] == 12
    assert {**twin.config, "guard": True} == run.config
    assert [pair.before for pair in run.probes] == [pair.before for pair in twin.probes]
    assert re.search(r"^run-control .*\n^run ", done.stdout, re.M)


def test_an_unguarded_run_has_no_control(data):
    done = kdguard("tune", data, "--model", "demo", "--no-guard", "--control")
    assert done.returncode == 2 and "leave out --no-guard" in done.stderr


def test_plain_text_is_taught_and_asks_nothing_new(some_probes, tmp_path):
    """Several files of it: nothing is learned that could be counted, and what is forgotten still is."""
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": f"The mayor of {name} is Ann. " * 60}) + "\n")
    flags = ("--model", "demo", "--epochs", 1, "--prompts", 1, "--probes", some_probes, "--max-length", 64)
    run = tmp_path / "run"
    done = kdguard("tune", tmp_path / "one.jsonl", tmp_path / "two.jsonl", *flags, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "rows of text, " in " ".join(done.stdout.split()) and "new questions" not in done.stdout
    report = json.loads((run / "report.json").read_text())
    assert report["learned"]["n"] == 0 and report["kept"]["known"] > 300
    assert report["data"] == f"{tmp_path / 'one.jsonl'}, {tmp_path / 'two.jsonl'}"
    assert (run / "new" / "after.jsonl").read_text() == ""
    explained = kdguard("explain", run)
    assert explained.returncode == 2 and "plain text has no questions" in explained.stderr
    again = kdguard("tune", "--config", run / "config.yaml", "--out", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["kept"] == report["kept"]
