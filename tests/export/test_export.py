"""`kdguard export` as a person types it: the export answers as the tuned model does, and the report tells."""

import json
import re

import pytest

from kdguard.model.load import load_base
from kdguard.report.run import at_work, read_exported, read_run
from tests.test_cli import kdguard


def exported(run, *flags: object):
    done = kdguard("export", run, *flags, "--json")
    return done, json.loads(done.stdout) if done.stdout else {}


def test_merged_is_the_dialled_model_and_the_report_gains_it(run, tmp_path):
    """The weights that the 4-bit base stands for are those that the adapter was trained on."""
    before = read_run(run)
    done, entry = exported(run, "--to", "merged", "--out", tmp_path / "merged", "--budget", "1%")
    assert done.returncode == 0, done.stderr
    assert [each["onto"] for each in entry["tried"]] == ["the dequantised 4-bit base", "the 16-bit base"]
    chosen = next(each for each in entry["tried"] if each["onto"] == entry["onto"])
    assert chosen["lost"] == min(each["lost"] for each in entry["tried"]) == 0
    for what in ("probes", "new"):
        assert entry["same"][what]["count"] >= 0.99 * entry["same"][what]["n"] > 0
    after = read_run(run)
    assert after.report["exported"] == [entry] and entry["strength"] == 0.8
    assert {key: value for key, value in after.report.items() if key != "exported"} == before.report
    assert len(read_exported(run, after.report)) == len(before.probes) + len(before.new)
    page = (run / "report.html").read_text()
    assert "Exported, and asked again" in page and "<th>exported</th>" in page
    assert "| exported |" in (tmp_path / "merged" / "README.md").read_text()
    load_base(str(tmp_path / "merged"), quant="none")
    assert not list(tmp_path.glob("*.part"))
    shown = kdguard("compare", run)
    assert re.search(r"^merged ", shown.stdout, re.M)


def test_another_strength_forgets_the_exports(run, tmp_path):
    """They are of another model then."""
    done, _ = exported(run, "--to", "adapter", "--out", tmp_path / "adapter", "--questions", 5)
    assert done.returncode == 0, done.stderr
    done = kdguard("dial", run, "--strength", 0.5, "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert "exported" not in read_run(run).report and not (run / "exported").exists()


def test_nothing_of_others_gives_way_to_an_export(run, tmp_path):
    """Neither a folder beside it, nor what another export is writing, nor what has come to be there."""
    out = tmp_path / "adapter"
    theirs = tmp_path / "adapter.part" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    left = tmp_path / ".adapter.part" / "whole" / "model.gguf"
    left.parent.mkdir(parents=True)
    left.write_text("cut short")
    flags = ("--to", "adapter", "--out", out, "--questions", 0)
    with at_work(out):
        done, _ = exported(run, *flags)
        assert done.returncode == 2 and "another process is at work" in done.stderr and left.exists()
    done, _ = exported(run, *flags)
    assert done.returncode == 0, done.stderr
    assert theirs.read_text() == "mine" and not left.parent.parent.exists()
    assert not list(out.glob("*.gguf")) and not (out / ".lock").exists()


def test_the_adapter_alone_answers_word_for_word(run, tmp_path):
    done, entry = exported(run, "--to", "adapter", "--out", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert all(each["count"] == each["n"] for each in entry["same"].values())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]


def test_a_drop_over_the_budget_is_exit_3_and_the_export_is_left(run, tmp_path):
    """A run whose tuned model is said to have kept everything: what it forgot is then lost by the export."""
    path = run / "probes" / "after.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(not row["correct"] for row in rows) > 2
    path.write_text("".join(json.dumps(row | {"correct": True}) + "\n" for row in rows))
    done, entry = exported(run, "--to", "adapter", "--out", tmp_path / "adapter", "--budget", "1%")
    assert done.returncode == 3
    assert "over the budget of 1%" in done.stderr and "it is left in" in done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert entry["lost"]["probes"]["count"] > 2


BAD = {
    "no llama.cpp": (["--to", "gguf"], "llama.cpp is not here"),
    "not a folder of llama.cpp": (["--to", "gguf", "--llama-cpp", "."], "found no convert_hf_to_gguf.py"),
    "a type of GGUF for a model folder": (["--to", "merged", "--quantize", "q4_k_m"], "--quantize"),
    "a base that nothing is put on": (["--to", "ollama", "--base", "llama3.1"], "--base"),
    "a budget without questions": (["--to", "merged", "--budget", "1%", "--questions", "0"], "--budget"),
    "an unknown kind": (["--to", "onnx"], "'onnx' is not one of"),
    "a budget that is none": (["--to", "merged", "--budget", "much"], "--budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line_with_a_remedy_and_writes_nothing(finished, tmp_path, case):
    flags, expected = BAD[case]
    done = kdguard("export", finished, *flags, "--out", tmp_path / "out", PATH="/nowhere")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert lines[0].startswith("error ") and expected in lines[0] and lines[1].strip().startswith("try ")
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_used_or_inside_the_run_is_refused(finished, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, finished / "merged"):
        assert kdguard("export", finished, "--to", "merged", "--out", out).returncode == 2


def test_without_llama_cpp_the_commands_are_said(finished, tmp_path):
    """They are what would have been run: the converter, with the name of a way of cutting text, then the quantiser."""
    flags = ("--to", "gguf", "--quantize", "q4_k_m", "--out", tmp_path / "out")
    said = kdguard("export", finished, *flags, PATH="/nowhere", COLUMNS="1000").stderr
    merged, convert, quantize = said.split("by hand: ")[1].strip().split(" && ")
    assert merged == f"kdguard export {finished} --to merged --out {tmp_path / 'out'}"
    whole = f"{tmp_path / 'out'}-f16.gguf"
    assert convert.endswith(f"smollm convert_hf_to_gguf.py {tmp_path / 'out'} --outfile {whole} --outtype f16")
    assert quantize == f"llama-quantize {whole} {tmp_path / 'out'}-q4_k_m.gguf Q4_K_M"
