"""Which rows did it: named by their overlap with what was forgotten, and told in the report."""

import json
import shutil

import pytest
import torch

from kdguard.data.tokens import Renderer
from kdguard.probes.overlap import moved, overlap, states
from tests.test_cli import kdguard
from tests.test_dial import plain  # noqa: F401


@pytest.fixture
def run(plain, tmp_path):  # noqa: F811
    return shutil.copytree(plain, tmp_path / "run")


def test_every_forgotten_probe_has_ten_rows_by_file_and_line(run):
    done = kdguard("explain", run, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((run / "explain.json").read_text())
    report = json.loads((run / "report.json").read_text())
    assert len(found["probes"]) == found["forgotten"] == report["kept"]["forgotten"] > 0
    for probe in found["probes"]:
        shares = [row["overlap"] for row in probe["rows"]]
        assert len(shares) == 10 and shares == sorted(shares, reverse=True)
        assert all("facts.jsonl:" in row["where"] for row in probe["rows"])
    assert found["moved"]["forgotten"] > 0
    assert "rows nearest to it" in (run / "report.html").read_text()


def test_without_a_control_nothing_is_trained_and_with_one_it_is_kept(run):
    done = kdguard("explain", run)
    assert done.returncode == 0 and "not told" in done.stdout, done.stderr
    assert not (run / "known-only").exists()
    with_control = kdguard("explain", run, "--control", "--json")
    assert with_control.returncode == 0, with_control.stderr
    control = json.loads(with_control.stdout)["cloning"]
    assert control["trained"] == 40 and control["forgetting"] < control["this_run"]
    assert json.loads(kdguard("explain", run, "--json").stdout)["cloning"] == control


def test_changed_data_is_refused(run):
    config = (run / "config.yaml").read_text()
    data = run / "other.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n')
    lines = [f"data: {data}" if line.startswith("data:") else line for line in config.splitlines()]
    (run / "config.yaml").write_text("\n".join(lines))
    for command in ("explain", "dial"):
        done = kdguard(command, run)
        assert done.returncode == 2 and "has changed since this run" in done.stderr


def test_the_overlap_does_not_depend_on_the_batch(demo):
    renderer = Renderer(demo.tokenizer)
    prompts = [renderer.prompt(f"What is the capital of {name}?") for name in ("France", "the Bahamas", "Peru")]
    together = states(demo.model, prompts)
    alone = torch.cat([states(demo.model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert moved(together, alone).abs().max() < 1e-4


def test_a_question_overlaps_most_with_one_of_its_kind(demo):
    renderer = Renderer(demo.tokenizer)
    old, new = (
        states(demo.model, [renderer.prompt(question) for question in questions])
        for questions in (
            ["What is the capital of France?", "What is the chemical symbol for gold?"],
            ["What is the chemical symbol for silver?", "What is the capital of Peru?", "Who wrote Ulysses?"],
        )
    )
    assert overlap(old, new).argmax(1).tolist() == [1, 0]
