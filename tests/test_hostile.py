"""What comes from others runs nothing here, and leads nowhere: configs, models, tokenizers, checkpoints."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig

from kdguard.config import TuneConfig, presets, resolve
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.files import refuse_foreign
from kdguard.guard.budget import BudgetKeeper
from kdguard.guard.checkpoint import WHOLE, last_whole
from kdguard.guard.rehearsal import REHEARSAL, load_rows
from kdguard.guard.teacher import Guard
from kdguard.model.load import load_base, load_config, load_tokenizer, own_tokenizer
from kdguard.probes.watch import Allowance
from kdguard.report.run import DIAL, EXPLAIN, is_finished, read_explained, unfinished_config
from kdguard.report.schema import read_dial
from tests.test_cli import kdguard

FLAGS = {"data": "a.jsonl", "model": "demo"}
PLANTED = "from pathlib import Path\nPath({mark!r}).write_text('run')\n"
CONFIG_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Planted(LlamaConfig):
    model_type = "planted"
class PlantedModel(LlamaForCausalLM):
    config_class = Planted
"""


@pytest.fixture
def with_code(tiny, tmp_path, monkeypatch):
    """A model that is Llama by code of its own, and the file that this code writes when it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "model", tmp_path / "was-run"
    shutil.copytree(tiny("llama"), folder)
    said = json.loads((folder / "config.json").read_text())
    said |= {
        "model_type": "planted",
        "auto_map": {"AutoConfig": "code.Planted", "AutoModelForCausalLM": "code.PlantedModel"},
    }
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "code.py").write_text(PLANTED.format(mark=str(mark)) + CONFIG_CODE)
    return folder, mark


def test_code_that_comes_with_a_model_is_run_by_the_flag_alone(with_code):
    folder, mark = with_code
    for load in (load_config, load_tokenizer, load_base):
        with pytest.raises(InputError, match="without running the Python code that comes with it") as caught:
            load(str(folder))
        assert "--trust-remote-code" in caught.value.hint
    assert not mark.exists()
    assert load_base(str(folder), quant="none", trust_remote_code=True).model(torch.arange(6, 9)[None]).logits.shape
    assert mark.exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(tiny, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "was-run"
    shutil.copytree(tiny("llama"), folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said |= {"tokenizer_class": "Planted", "auto_map": {"AutoTokenizer": [None, "code.Planted"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "code.py").write_text(PLANTED.format(mark=str(mark)))
    with pytest.raises(InputError):
        load_tokenizer(str(folder))
    with pytest.raises(InputError):
        own_tokenizer(folder)
    assert not mark.exists()


def test_a_kernel_that_a_config_names_is_not_fetched(tiny, tmp_path):
    """transformers fetches such an attention from the hub and runs it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"attn_implementation": "somebody/attention"}))
    with pytest.raises(InputError, match="without running"):
        load_base(str(folder))


def test_the_flag_warns_in_words_and_its_absence_is_one_line(with_code, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    asked = ("data", "show", tmp_path / "a.jsonl", "--model", with_code[0])
    refused = kdguard(*asked, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert refused.returncode == 2 and not with_code[1].exists()
    assert "--trust-remote-code" in refused.stderr and len(refused.stderr.strip().splitlines()) == 2
    done = kdguard(*asked, "--trust-remote-code", HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning") and "all that you can" in done.stderr
    assert with_code[1].exists()


def test_neither_a_preset_nor_a_file_turns_the_code_on(tmp_path):
    """A config can be anybody's; that of a run keeps the fact, so that going on with it asks for the flag."""
    assert not any("trust_remote_code" in preset for preset in presets().values())
    assert not resolve(FLAGS).trust_remote_code and not TuneConfig(**FLAGS).trust_remote_code
    file = tmp_path / "config.yaml"
    file.write_text(resolve(FLAGS | {"trust_remote_code": True}).to_yaml())
    assert yaml.safe_load(file.read_text())["trust_remote_code"] is True
    for flags in ({}, {"trust_remote_code": False}):
        with pytest.raises(InputError, match="no file turns that on") as caught:
            resolve(flags, file)
        assert "--trust-remote-code" in caught.value.hint
    assert resolve({"trust_remote_code": True}, file).trust_remote_code


def test_an_adapter_does_not_choose_whose_code_is_run(tmp_path):
    done = kdguard("adopt", tmp_path, "--trust-remote-code")
    assert done.returncode == 2 and "--base" in done.stderr


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_model_of_pickles_is_refused_with_the_way_to_convert_it(tiny, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    (folder / "model.safetensors").rename(tmp_path / "kept")
    torch.save({}, folder / name)
    with pytest.raises(InputError, match="only pickled weights") as caught:
        load_base(str(folder))
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize("shard", ["../kept.safetensors", "/etc/passwd", "a\\b.safetensors", "x.bin", 3])
def test_an_index_of_weights_does_not_lead_out_of_its_folder(tiny, tmp_path, shard):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InputError, match="beside it"):
        load_base(str(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="no index"):
        load_base(str(folder))


def test_a_model_with_an_adapter_in_it_is_no_base(tiny, tmp_path):
    """transformers would put it on, and what is called the base would be somebody's tuned model."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="found an adapter"):
        load_base(str(folder))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"model_type": ["a"]}',
        b'{"model_type": "llama", "hidden_size": "x"}',
        b"[" * 100_000,
    ],
)
def test_a_models_config_of_any_bytes(tiny, tmp_path, content):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError):
        load_base(str(folder))


@pytest.mark.parametrize(
    "text",
    [
        "out: /etc/kdguard",
        "out: ../elsewhere",
        "out: runs/../../elsewhere",
        "out: 'C:\\Users'",
        "out: link/run",
        "data: ../secret.jsonl",
        "data: [a.jsonl, ..\\secret.jsonl]",
        "probes: [runs/../../pack.jsonl]",
        "model: ../model",
        "data: link/a.jsonl",
        "data: [a.jsonl, linked.jsonl]",
        "probes: [linked.jsonl]",
        "model: link",
    ],
)
def test_a_config_file_stays_in_its_folder(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/tmp")
    (tmp_path / "linked.jsonl").symlink_to("/etc/passwd")
    Path("c.yaml").write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml: found ") as caught:
        resolve(FLAGS, Path("c.yaml"))
    assert len(caught.value.message.splitlines()) == 1 and caught.value.hint


def test_what_a_config_file_may_name_and_what_flags_may(tmp_path, monkeypatch):
    """A run's own config names its data by absolute paths; and what is typed is meant."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"out: runs/mine\ndata: {tmp_path}/a.jsonl\nprobes: [packs/a..b.jsonl]\n")
    config = resolve({"model": "demo"}, Path("c.yaml"))
    assert (config.out, config.data, config.probes) == (
        Path("runs/mine"),
        [f"{tmp_path}/a.jsonl"],
        ["packs/a..b.jsonl"],
    )
    assert resolve({**FLAGS, "out": Path("../x"), "data": ["../a.jsonl"]}).data == ["../a.jsonl"]


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\nb: *a",
        "epochs: !!bool maybe",
        "epochs: !!timestamp x",
        "epochs: 2020-13-45",
        "epochs: !!int x",
        "epochs: !!float x",
        "? [a]\n: 1",
        "[" * 5000,
        "preset: [a]",
        "preset: {a: 1}",
        "lr: .inf",
        "lr: .nan",
        f"seed: {10**30}",
        "batch_size: " + "9" * 5000,
        "budget: .nan%",
        '"\\ud800": 1',
        'goal: "\\ud800"',
        'out: "a\\0b"',
        'data: "a\\0b"',
        "x" * 2**20 + ": 1",
        "!!python/object/apply:os.getcwd []",
    ],
    ids=lambda text: text[:20],
)
def test_a_config_of_any_text_is_a_config_or_one_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        resolve(FLAGS, tmp_path / "c.yaml")
    assert len(caught.value.message.splitlines()) == 1 and len(caught.value.message) < 1000
    caught.value.message.encode()


def test_a_run_of_another_user_is_not_gone_on_with(tmp_path, monkeypatch):
    """Its optimiser and random numbers are pickles. Root is refused another's too, for it can be made to read them."""
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    pickled = tmp_path / "checkpoints" / "checkpoint-1" / "optimizer.pt"
    pickled.write_bytes(b"")
    (tmp_path / "config.yaml").write_text("model: demo")
    refuse_foreign(tmp_path)
    assert unfinished_config(tmp_path) == tmp_path / "config.yaml"
    if os.getuid() == 0:
        os.chown(pickled, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(InputError, match="of another user") as caught:
        unfinished_config(tmp_path)
    assert "chown" in caught.value.hint
    done = kdguard("tune", "--resume", "--out", tmp_path)
    assert os.getuid() or (done.returncode == 2 and "of another user" in done.stderr)


def test_an_absolute_path_stands_in_a_config_of_ones_own_alone(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    monkeypatch.chdir(tmp_path)
    for text in ("data: /etc/passwd", "probes: [/etc/passwd]", "model: /etc"):
        file.write_text(text)
        file.chmod(0o664)
        resolve({"model": "demo"}, file)
        file.chmod(0o666)
        with pytest.raises(InputError, match=r"c\.yaml: found .* anybody may write") as caught:
            resolve({"model": "demo"}, file)
        assert "chmod o-w" in caught.value.hint
        file.chmod(0o644)
        with monkeypatch.context() as other, pytest.raises(InputError, match="of another user"):
            other.setattr(os, "getuid", lambda: 12345)
            resolve({"model": "demo"}, file)
    file.write_text("data: a.jsonl\nprobes: [packs/mine.jsonl]\nmodel: Qwen/Qwen2.5-7B\n")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert resolve({}, file).data == ["a.jsonl"]


def test_what_anybody_may_write_is_not_gone_on_with(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    pickled = folder / "optimizer.pt"
    pickled.write_bytes(b"")
    for path, mine, anybodys in ((pickled, 0o664, 0o666), (folder, 0o775, 0o777)):
        path.chmod(anybodys)
        with pytest.raises(InputError, match="anybody may write this") as caught:
            refuse_foreign(tmp_path / "run")
        assert caught.value.message.startswith(f"{path}: ") and caught.value.hint.endswith(f"chmod -R o-w {path}")
        path.chmod(mine)
        refuse_foreign(tmp_path / "run")
    folder.chmod(0o1777)
    refuse_foreign(tmp_path / "run")


def test_a_linked_folder_is_looked_into_once(tmp_path):
    behind, run = tmp_path / "behind", tmp_path / "run"
    (behind / "checkpoint-1").mkdir(parents=True)
    run.mkdir()
    (run / "checkpoints").symlink_to(behind)
    (behind / "back").symlink_to(run)
    refuse_foreign(run)
    pickled = behind / "checkpoint-1" / "optimizer.pt"
    pickled.write_bytes(b"")
    if os.getuid() == 0:
        os.chown(pickled, 12345, -1)
    else:
        pickled.chmod(0o666)
    with pytest.raises(InputError, match=r"optimizer\.pt: (this is of another user|anybody may write)"):
        refuse_foreign(run)


def test_a_link_to_another_users_file_is_another_users(tmp_path):
    if os.getuid() == 0:
        other = tmp_path.with_name(f"{tmp_path.name}-other")
        other.write_bytes(b"")
        os.chown(other, 12345, -1)
        (tmp_path / "optimizer.pt").symlink_to(other)
    else:
        (tmp_path / "optimizer.pt").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="of another user"):
        refuse_foreign(tmp_path)


READERS = {
    EXPLAIN: lambda run: read_explained(run),
    DIAL: lambda run: read_dial(run / DIAL),
    REHEARSAL: lambda run: load_rows(run / REHEARSAL, SimpleNamespace(config=LlamaConfig(vocab_size=300))),
    "watched.json": lambda run: BudgetKeeper(Guard(), lambda: 0, Allowance(0.01, 9), run, Events()).on_train_begin(
        None, SimpleNamespace(global_step=1, max_steps=2, epoch=0.5), None
    ),
}


@pytest.mark.parametrize("content", ["{", "[1]", '["a"]', "[[]]", "{}", "null", "[-1]", "[300]", "[true]", "[" * 10**5])
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_a_run_of_any_bytes_is_one_line(tmp_path, name, content):
    if (name, content) == (REHEARSAL, "[1]"):
        content = "[1]\n[1, 2.0]"
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}(:[12])?: found no ") as caught:
        READERS[name](tmp_path)
    assert len(caught.value.message.splitlines()) == 1 and caught.value.hint.startswith(f"rm {tmp_path / name}; ")


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"files": 1}', '{"files": ["a"]}', "[" * 10**5, "\0"])
def test_a_checkpoint_whose_list_is_of_any_bytes_is_not_whole(tmp_path, content):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / WHOLE).write_text(content)
    assert last_whole(tmp_path) is None


def test_the_trainer_reads_the_pickles_of_a_checkpoint_as_weights_only():
    """transformers 5.23 does; one that no longer did would run what a checkpoint says."""
    import inspect

    from transformers import trainer

    loads = inspect.getsource(trainer).split("torch.load(")[1:]
    assert loads and all("weights_only=True" in load[:400] for load in loads)


@pytest.mark.parametrize("link", ["adapter", "dialled"])
def test_a_dial_that_others_have_begun_is_finished_within_the_run(tmp_path, link):
    """Links in it are replaced or left alone, and never followed: to read a run harms nothing beside it."""
    run, new, mine = tmp_path / "run", tmp_path / "new", tmp_path / "mine"
    for folder in (run, new, mine):
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "README.md").write_text(folder.name)
        (folder / "report.json").write_text("{}")
    if link == "dialled":
        (run / "dialled").symlink_to(mine)
    else:
        new.rename(run / "dialled")
        shutil.rmtree(run / "adapter")
        (run / "adapter").symlink_to(mine / "adapter")
    assert is_finished(run)
    assert (mine / "adapter" / "README.md").read_text() == "mine" and (mine / "report.json").exists()
    assert (run / "adapter" / "README.md").read_text() == ("run" if link == "dialled" else "new")
