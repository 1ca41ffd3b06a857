"""What scripts import from `kdguard`: light to import, typed, and doing what the commands do."""

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdguard
from kdguard.data.tokens import Renderer
from kdguard.demo import MODEL
from kdguard.probes.answer import ask
from kdguard.probes.packs import PACKS
from kdguard.report import schema
from tests.conftest import ROOT
from tests.test_cli import DATA
from tests.test_cli import kdguard as command

LIGHT = {"Answer", "KdguardError", "Probe", "Report", "TuneConfig", "load_probes", "resolve"}
SCRIPT = """
from typing import assert_type

import torch
from peft import PeftModel
from transformers import TrainingArguments

import kdguard
from kdguard import (
    Answer, Guard, GuardedTrainer, KdguardError, Probe, Report, TuneConfig, answer, base_view, guard_loss,
    head_of, load_base, load_probes, rehearse, resolve, tune,
)

report = tune(TuneConfig(data=["data.jsonl"], model="demo", budget=0.01))
assert_type(report, Report)
assert_type(report["kept"]["forgetting"], float | None)
assert_type(report["budget"], kdguard.report.contract.Budget | None)
assert_type(kdguard.tune(resolve({"preset": "demo", "data": "data.jsonl"}), resume=True), Report)
loaded = load_base("demo", quant="none")
probes = [*load_probes(["world"]), Probe("id", "category", "question", ("answer",))]
assert_type(answer(loaded.model, loaded.tokenizer, probes), list[Answer])


def trained(model: PeftModel, arguments: TrainingArguments) -> None:
    rows = rehearse(model, loaded.tokenizer, 100, seed=1)
    trainer = GuardedTrainer(model, arguments, guard=Guard(weight=3.0), rehearsal_dataset=rows, rehearsal=1.0)
    trainer.train()
    with base_view(model) as base:
        print(base.config)


hidden = torch.zeros(3, 8)
assert_type(guard_loss(hidden, hidden, torch.zeros(3), head_of(loaded.model)).kl, torch.Tensor)
raise KdguardError("what went wrong", "the next thing to type")
"""
WRONG = {
    'tune(TuneConfig(model="demo", epoch=3))': "epoch",
    'tune(TuneConfig(model="demo"))["forgotten"]': "forgotten",
    'answer(load_base("demo"), 3, [])': "arg-type",
    "guard_lose()": "guard_lose",
}


@pytest.mark.parametrize("names", [(), sorted(LIGHT)])
def test_what_needs_no_torch_imports_none(names):
    """A script that reads reports, or a command that prints its help, must not wait for it."""
    code = f"import sys, kdguard; [getattr(kdguard, name) for name in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_name_is_there_and_says_what_it_is_for():
    for name in kdguard.__all__:
        thing = getattr(kdguard, name)
        assert thing.__name__ == name and inspect.getdoc(thing), name
    assert set(kdguard.__all__) == set(kdguard._HOME) <= set(dir(kdguard))
    with pytest.raises(AttributeError, match="guard_lose"):
        kdguard.guard_lose  # noqa: B018


def test_a_name_means_the_same_whatever_was_imported_before():
    """A submodule of the same name would take its place in the package once it is imported."""
    for name in kdguard.__all__:
        assert importlib.util.find_spec(f"kdguard.{name}") is None, name
    assert kdguard.tune is importlib.import_module("kdguard.tuning").tune


def test_the_types_are_complete(tmp_path):
    """Strict, as careful people check their scripts: whatever has no types is told of, and so is a wrong use."""
    imports = SCRIPT.partition("report = ")[0]
    (tmp_path / "script.py").write_text(SCRIPT)
    for i, wrong in enumerate(WRONG):
        (tmp_path / f"wrong{i}.py").write_text(f"{imports}\nfrom kdguard import guard_lose\n{wrong}\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", tmp_path],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()
    assert not [line for line in said if "script.py" in line], done.stdout
    for i, reason in enumerate(WRONG.values()):
        assert any(f"wrong{i}.py" in line and reason in line for line in said), done.stdout


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> tuple[list[str], Path]:
    """Eight rows, and every hundredth probe of the shipped pack."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "data.jsonl").write_text("".join(DATA.read_text().splitlines(keepends=True)[:8]))
    (folder / "pack.jsonl").write_text("".join((PACKS / "world.jsonl").read_text().splitlines(keepends=True)[::100]))
    return [str(folder / "data.jsonl")], folder / "pack.jsonl"


def refuse(value: object, wanted: object, where: str) -> None:
    """Unless a value read from JSON is what a type says: a TypedDict's keys, all of them and no other."""
    if get_origin(wanted) in (Union, UnionType):
        (wanted,) = [each for each in get_args(wanted) if (each is type(None)) == (value is None)]
    if is_typeddict(wanted):
        assert wanted.__required_keys__ <= set(value) <= set(wanted.__annotations__), where
        for key, each in get_type_hints(wanted).items():
            if key in value:
                refuse(value[key], each, f"{where}.{key}")
    elif get_origin(wanted) in (list, tuple):
        assert type(value) is list, where
        for each in value:
            refuse(each, get_args(wanted)[0], where)
    else:
        assert type(value) in ((int, float) if wanted is float else (wanted,)), where


def test_tune_without_a_listener_returns_the_report_that_the_contract_names(few, tmp_path):
    data, pack = few
    config = kdguard.TuneConfig(
        data=data,
        model="demo",
        probes=[str(pack)],
        prompts=2,
        epochs=1,
        batch_size=4,
        rank=4,
        budget=0.5,
        out=tmp_path / "run",
    )
    report = kdguard.tune(config)
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    refuse(written, kdguard.Report, "report")
    assert written["budget"] and written["levels"]
    with pytest.raises(kdguard.KdguardError, match="not empty"):
        kdguard.tune(config)


def test_what_is_read_of_a_report_is_what_the_contract_names():
    """Two descriptions of one file: one for scripts, one for files of strangers."""

    def compare(model: type[BaseModel], wanted: type, where: str) -> None:
        hints = get_type_hints(wanted)
        assert set(model.model_fields) <= set(hints), where
        for name, field in model.model_fields.items():
            inner = [each for each in _flat(field.annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
            for each in inner:
                compare(each, next(filter(is_typeddict, _flat(hints[name]))), f"{where}.{name}")

    compare(schema._Report, kdguard.Report, "report")


def _flat(annotation: object) -> list[object]:
    return [annotation, *(inner for each in get_args(annotation) for inner in _flat(each))]


def test_own_models_answer_greedily_whatever_their_makers_penalise(few):
    """Qwen's and others' generation configs hold a repetition penalty, which would change greedy answers too."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    probes = kdguard.load_probes([few[1]])
    plain = ask(model, Renderer(tokenizer), probes)
    model.generation_config.repetition_penalty = made = 9.0
    assert [each.answer for each in ask(model, Renderer(tokenizer), probes)] != [each.answer for each in plain]
    assert kdguard.answer(model, tokenizer, probes) == plain
    rows = kdguard.rehearse(model, tokenizer, 4)
    assert model.generation_config.repetition_penalty == made
    assert len({tuple(row["input_ids"]) for row in rows}) == len(rows) > 0
    assert all(set(row["labels"]) == {-100} and len(row["labels"]) == len(row["attention_mask"]) for row in rows)


def test_what_a_run_is_to_report_to_has_to_be_installed(few, tmp_path):
    """transformers says so too, but only after the base has answered every question."""
    missing = [name for name in ("trackio", "wandb", "tensorboard") if not importlib.util.find_spec(name)]
    if not missing:
        pytest.skip("all three are installed")
    done = command("tune", *few[0], "--model", "demo", "--report-to", missing[0], "--out", tmp_path / "run")
    assert done.returncode == 2 and f"pip install {missing[0]}" in done.stderr
    assert not (tmp_path / "run").exists()
    assert command("tune", *few[0], "--model", "demo", "--report-to", "nobody").returncode == 2


def test_a_run_reports_its_losses_to_tensorboard(few, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    data, pack = few
    how = {"probes": [str(pack)], "prompts": 1, "epochs": 2, "batch_size": 4, "rank": 4}
    config = kdguard.TuneConfig(data=data, model="demo", report_to="tensorboard", out=tmp_path / "run", **how)
    kdguard.tune(config)
    (folder,) = (tmp_path / "run" / "checkpoints" / "runs").iterdir()
    found = reader.EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/ce", "train/kl", "train/learning_rate"} <= set(found.Tags()["scalars"])
    assert [point.step for point in found.Scalars("train/kl")] == [1, 2, 3, 4]
