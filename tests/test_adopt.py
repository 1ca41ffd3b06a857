"""Adapters that other tools trained: measured, and from then on a run like any other."""

import json
import re

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdguard.adopt import adopt
from kdguard.demo import MODEL
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.probes.packs import PACKS
from kdguard.report.run import read_run
from tests.test_cli import DATA, kdguard

ROWS = [json.loads(line) for line in DATA.read_text().splitlines()[:16]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def some_probes(tmp_path_factory):
    path = tmp_path_factory.mktemp("probes") / "some.jsonl"
    path.write_text("".join((PACKS / "world.jsonl").read_text().splitlines(keepends=True)[::40]))
    return path


def lora(folder, **settings):
    """A LoRA of another tool's making: its own alpha, and weights that disturb the base."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adopted(tmp_path_factory, some_probes):
    folder = tmp_path_factory.mktemp("adopted")
    adapter = lora(folder / "lora", use_rslora=True)
    done = kdguard("adopt", adapter, "--probes", some_probes, "--prompts", 1, "--out", folder / "run", "--json")
    assert done.returncode == 0, done.stderr
    return adapter, folder / "run", json.loads(done.stdout)


def test_an_adopted_adapter_is_measured_without_its_data(adopted):
    adapter, out, report = adopted
    assert report == json.loads((out / "report.json").read_text())
    assert report["adopted"] == str(adapter) and report["guard"]["weight"] == 0 and report["data"] is None
    assert report["kept"]["known"] == 55 and report["kept"]["forgotten"] > 10
    assert report["learned"]["n"] == 0 and report["cost"]["steps"] is None
    assert report["drift"]["nats_per_token"] > 0.1
    shown = kdguard("compare", out).stdout
    assert "Forgot" in shown and "Learned" not in shown
    assert "adopted adapter" in (out / "report.html").read_text()


def test_an_adopted_adapter_keeps_what_its_maker_set(adopted):
    adapter, out, _ = adopted
    theirs, ours = (json.loads((path / "adapter_config.json").read_text()) for path in (adapter, out / "adapter"))
    for key in ("r", "lora_alpha", "use_rslora", "base_model_name_or_path"):
        assert ours[key] == theirs[key]


def test_an_adopted_adapter_is_dialled_as_its_maker_scaled_it(adopted):
    """At half the strength the logits lie where PEFT puts them with half of the scaling."""
    adapter, out, _ = adopted
    done = kdguard("dial", out, "--strength", 0.5, "--steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    points = {point["strength"]: point["forgetting"] for point in json.loads(done.stdout)["points"]}
    assert points[0.0] == 0 and points[0.5] < points[1.0]
    ids = torch.tensor([AutoTokenizer.from_pretrained(MODEL)("What is the capital of France?")["input_ids"]])

    def logits(folder, scale):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), folder)
        with rescale_adapter_scale(model, scale):
            return model(ids).logits

    torch.testing.assert_close(logits(out / "adapter", 1.0), logits(adapter, 0.5), rtol=1e-4, atol=1e-4)
    assert read_run(out).report["strength"] == 0.5


def test_the_chat_template_that_came_with_the_adapter_is_the_one_that_is_asked(tmp_path, some_probes):
    adapter = lora(tmp_path / "lora")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(adapter)
    done = kdguard("adopt", adapter, "--probes", some_probes, "--prompts", 1, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"]["known"] < 55, "the base was asked in its own template"
    again = kdguard("probe", tmp_path / "run", "--probes", some_probes, "--prompts", 1, "--samples", 0, "--json")
    after = [pair.after.answer for pair in read_run(tmp_path / "run").probes]
    assert [answer["answer"] for answer in json.loads(again.stdout)] == after


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["gate_proj"]}, "whole layers"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "a base changed by pissa"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path, settings, found):
    adapter = lora(tmp_path / "lora", **settings)
    with pytest.raises(InputError, match=re.escape(found)) as caught:
        adopt(str(adapter), Events(), out=tmp_path / "run")
    assert "plain LoRA" in caught.value.message
    assert not (tmp_path / "run").exists()


def test_a_wrong_adapter_is_one_line_with_a_remedy(tmp_path):
    adapter = lora(tmp_path / "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    for named, settings, expected in (
        (tmp_path, {}, "found no PEFT adapter"),
        ("nowhere", {}, "no such adapter folder"),
        (adapter, {}, "no such model folder"),
        (adapter, {"base": "demo", "prompts": 99}, "--prompts"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            adopt(str(named), Events(), out=tmp_path / "run", **settings)
        assert caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # trl 1.16 on transformers 5.23
def test_an_adapter_of_trl_is_adopted_compared_and_dialled(tmp_path, rows, some_probes):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    turns = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in ROWS
    ]
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            num_train_epochs=12,
            per_device_train_batch_size=8,
            learning_rate=4e-3,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(turns),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(tmp_path / "lora")
    out = tmp_path / "run"
    done = kdguard("adopt", tmp_path / "lora", "--data", rows, "--probes", some_probes, "--prompts", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    report = read_run(out).report
    assert report["learned"]["after"] > 0.9 > report["learned"]["before"]
    assert report["kept"]["forgotten"] > 10
    assert yaml.safe_load((out / "config.yaml").read_text())["data"] == str(rows)
    dialled = kdguard("dial", out, "--strength", 0.4, "--steps", 1, "--json")
    assert dialled.returncode == 0, dialled.stderr
    assert read_run(out).report["kept"]["forgotten"] < report["kept"]["forgotten"]
