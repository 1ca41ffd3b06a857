"""Preset < config file < flags; anything unknown is refused with the nearest thing that exists."""

from pathlib import Path

import pytest

from kdguard.config import TuneConfig, presets, resolve
from kdguard.errors import InputError

FLAGS = {"data": "a.jsonl", "model": "some/model"}


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 3\nbatch-size: 4\n")
    config = resolve({"data": "a.jsonl", "preset": "qwen2.5-7b", "epochs": 2}, file)
    assert (config.epochs, config.batch_size, config.lr) == (2, 4, presets()["qwen2.5-7b"]["lr"])


def test_a_model_takes_the_preset_made_for_it():
    assert resolve({"data": "a.jsonl", "model": "demo"}).preset == "demo"
    assert resolve(FLAGS).preset is None


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_config_and_comments_every_number(name):
    resolve({"data": "a.jsonl", "preset": name})
    from kdguard.files import shipped

    lines = (shipped("presets") / f"{name}.yaml").read_text().splitlines()
    described = ("name:", "license:", "about:", "#", " ")  # a value that goes on is commented where it begins
    assert all("#" in line for line in lines if not line.startswith(described))


def test_a_preset_for_another_model_brings_neither_its_revision_nor_its_learning_rate():
    """A commit of one repository is none of another, and the learning rate goes by the model's width."""
    own = resolve({"data": "a.jsonl", "preset": "qwen3-8b"})
    assert own.revision and own.lr
    other = resolve({**FLAGS, "preset": "qwen3-8b"})
    assert (other.revision, other.lr, other.probes) == (None, None, own.probes)


def test_the_resolved_config_repeats_itself(tmp_path, monkeypatch):
    """From another folder too: what is a file here is one there, and what is the hub's stays that."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}")
    flags = {"data": ["a.jsonl", "owner/rows"], "columns": "question=Q,answer=A", "budget": "1%", "guard": False}
    config = resolve(FLAGS | flags)
    Path("config.yaml").write_text(config.to_yaml())
    again = resolve({}, Path("config.yaml"))
    assert again.model_dump(exclude={"data"}) == config.model_dump(exclude={"data"})
    assert again.data == [str(tmp_path / "a.jsonl"), "owner/rows"]


@pytest.mark.parametrize("given, share", [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02), (0.02, 0.02)])
def test_a_budget_is_a_percentage_or_a_share(given, share):
    assert TuneConfig(data="a", model="b", budget=given).budget == pytest.approx(share)


@pytest.mark.parametrize(
    "flags, expected, hint",
    [
        ({"preset": "qwen2.5"}, "no preset named 'qwen2.5'", "qwen2.5-7b"),
        ({"quant": "5bit"}, "--quant '5bit'", "quantisation"),
        ({"epochs": 0}, "--epochs 0", "passes"),
        ({"budget": "lots"}, "--budget 'lots'", "1%"),
        ({"budget": "200%"}, "--budget 2.0", "1%"),
        ({"batch_size": 10, "micro_batch_size": 4}, "micro-batch-size 4 does not divide", "--micro-batch-size"),
    ],
)
def test_a_wrong_value_says_what_is_right(flags, expected, hint):
    with pytest.raises(InputError, match=expected) as caught:
        resolve(FLAGS | flags)
    assert hint in caught.value.hint


def test_all_problems_are_told_at_once():
    with pytest.raises(InputError) as caught:
        resolve(FLAGS | {"epochs": 0, "lr": -1})
    assert "--epochs" in caught.value.message and "--lr" in caught.value.message


@pytest.mark.parametrize(
    "text, expected, hint",
    [
        ("epoch: 3", "unknown config key 'epoch'", "did you mean 'epochs'?"),
        ("zzz: 3", "unknown config key 'zzz'", "epochs"),
        ("- a", "found list, expected keys", "key: value"),
        ("a: [", "c.yaml:1: not YAML", "key: value"),
    ],
)
def test_a_wrong_config_file(tmp_path, text, expected, hint):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        resolve(FLAGS, file)
    assert hint in caught.value.hint


def test_a_config_is_loaded_safely(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: !!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match="not YAML"):
        resolve(FLAGS, file)


def test_style_has_defaults_of_its_own_over_those_of_a_preset_and_under_what_is_said():
    style = resolve({"data": "a.jsonl", "model": "demo", "goal": "style"})
    assert (style.epochs, style.rehearsal, style.max_length) == (2, 0.0, presets()["demo"]["max_length"])
    assert style.lr is None  # the style's own, higher
    assert resolve({"data": "a.jsonl", "model": "demo", "goal": "style", "epochs": 7}).epochs == 7
    assert TuneConfig(data="a.jsonl", model="demo", goal="style").epochs == 2
    assert resolve({"data": "a.jsonl", "model": "demo"}).epochs == presets()["demo"]["epochs"]


def test_a_budget_rehearses_more_unless_told_otherwise():
    assert resolve({"data": "a.jsonl", "model": "demo", "budget": "1%"}).rehearsal == 2.0
    assert resolve({"data": "a.jsonl", "model": "demo", "budget": "1%", "rehearsal": 0.5}).rehearsal == 0.5
    assert resolve({"data": "a.jsonl", "model": "demo", "budget": "1%", "goal": "style"}).rehearsal == 0.0
