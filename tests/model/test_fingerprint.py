"""A run's fingerprint: the same for the same run, another one for whatever would make it another run."""

import json
import shutil
import time
from dataclasses import replace
from importlib.metadata import version

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdguard.config import TuneConfig
from kdguard.data.rows import tokenise
from kdguard.data.tokens import Renderer
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.model.fingerprint import changes, fingerprint, of_base, refuse_other_base
from kdguard.model.load import load_base
from kdguard.probes.packs import Probe


def compare(path, folder) -> None:
    base = load_base(str(folder), quant="none")
    refuse_other_base(path, base.name, of_base(base))


@pytest.fixture
def folder(tiny, tmp_path):
    """A tiny model that a test may spoil."""
    return shutil.copytree(tiny("llama"), tmp_path / "model")


def made(folder, tmp_path, rows=(("Who?", "Ann."), ("Where?", "Here.")), probes=(), **config) -> dict[str, str]:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    config = TuneConfig(**{"data": str(data), "model": str(folder), "quant": "none", "lr": 1e-3, **config})
    base = load_base(str(folder), quant=config.quant)
    return fingerprint(config, base, tokenise([str(data)], Renderer(base.tokenizer), 128), probes)


def test_the_same_run_has_the_same_fingerprint_wherever_it_lies(folder, tmp_path):
    was = made(folder, tmp_path)
    moved = shutil.move(folder, tmp_path / "moved")
    assert changes(was, made(moved, tmp_path, out="elsewhere")) == {}
    assert all(isinstance(value, str) for value in was.values())


def test_a_base_loaded_in_4_bit_has_the_weights_of_the_same_base_loaded_whole(folder):
    """Quantised weights differ between devices: what lies in the file does not."""
    whole, quantised = (of_base(load_base(str(folder), quant=quant)) for quant in ("none", "4bit"))
    assert changes(whole, quantised) == {"quant": "the quantisation (none then, 4bit nf4 double now)"}


def test_shards_of_the_same_weights_are_the_same_base(folder, tmp_path):
    was = of_base(load_base(str(folder), quant="none"))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    for file in folder.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, tmp_path / "sharded")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert of_base(load_base(str(tmp_path / "sharded"), quant="none")) == was


def other_weights(folder):
    """A single tensor, as when an adapter of one layer was merged."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"] += 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_config(folder):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"rms_norm_eps": 0.1, "transformers_version": "9"}))


def other_template(folder):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}")


def other_tokenizer(folder):
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(found))


OTHER = {
    "the base's weights": other_weights,
    "the base's config.json": other_config,
    "the chat template": other_template,
    "the tokenizer": other_tokenizer,
}


@pytest.mark.parametrize("what", OTHER)
def test_another_base_is_refused_by_what_differs(folder, tmp_path, what):
    """Its answers would be those of an adapter on a model that nobody trained."""
    path = tmp_path / "run" / "fingerprint.json"
    path.parent.mkdir()
    path.write_text(json.dumps(of_base(load_base(str(folder), quant="none"))))
    compare(path, folder)
    OTHER[what](folder)
    with pytest.raises(InputError) as caught:
        compare(path, folder)
    assert caught.value.message.endswith(f"was trained on; other than then: {what}")
    assert str(path.parent / "config.yaml") in caught.value.hint


def test_a_library_of_another_version_is_noted_and_not_refused(folder, tmp_path):
    path = tmp_path / "fingerprint.json"
    base = load_base(str(folder), quant="none")
    path.write_text(json.dumps({**of_base(base), "torch": "2.0.0", "unheard of": "1"}))
    told = []
    refuse_other_base(path, base.name, of_base(base), Events(told.append))
    assert [event["event"] for event in told] == ["warning"]
    assert told[0]["what"].endswith(f"other versions: torch (2.0.0 then, {version('torch')} now)")


def test_a_run_without_a_fingerprint_is_not_refused(folder, tmp_path):
    """Older runs have none."""
    compare(tmp_path / "none.json", folder)
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        compare(tmp_path / "torn.json", folder)


def test_other_rows_and_other_settings_are_told(folder, tmp_path):
    was = made(folder, tmp_path)
    assert changes(was, made(folder, tmp_path, rows=[("Who?", "Ann."), ("Where?", "There.")])) == {
        "data": "the training rows"
    }
    assert changes(was, made(folder, tmp_path, rows=[("Where?", "Here."), ("Who?", "Ann.")])) == {
        "data": "the training rows"
    }
    assert changes(was, made(folder, tmp_path, lr=2e-3)) == {"--lr": "--lr (0.001 then, 0.002 now)"}
    probe = Probe("1", "c", "Who?", ("Ann",))
    assert changes(
        made(folder, tmp_path, probes=[probe]), made(folder, tmp_path, probes=[replace(probe, answers=("A",))])
    )


def test_rows_of_a_template_that_writes_the_date_are_the_same_tomorrow(folder, tmp_path, monkeypatch):
    """Their tokens are not, and a run that was stopped overnight has to go on."""
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %H:%M:%S') }}" + template.read_text())
    was = made(folder, tmp_path)
    time.sleep(1.1)
    assert changes(was, made(folder, tmp_path)) == {}
    assert changes(was, made(folder, tmp_path, rows=[("Who?", "Bob.")])) == {"data": "the training rows"}
