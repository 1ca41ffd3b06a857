"""Faults put into single rows of a training: no weight is touched by them, the rows are named, and the run goes on."""

import json

import pytest
import torch
from transformers import TrainerCallback

from kdguard.data.batches import pack
from kdguard.data.rows import tokenise
from kdguard.data.tokens import Renderer, Row
from kdguard.errors import InputError, KdguardError
from kdguard.model.load import add_adapter, load_base
from tests.guard.test_trainer import adapter, rows, trainer, unlabelled

BAD = 299  # a token that `rows` never uses


def put_in(model, fault: str) -> dict[str, bool]:
    """From now on a row with BAD in it has such a loss or gradient. The answer's `off` takes it away again."""
    seen = {"bad": False, "off": False}

    def look(module, inputs, output):
        seen["bad"] = bool((inputs[0] == BAD).any()) and not seen["off"]

    def spoil(module, inputs, output):
        if seen["bad"] and fault == "loss":
            return output * float("nan")
        if seen["bad"] and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    model.get_input_embeddings().register_forward_hook(look)
    next(module for name, module in model.named_modules() if name.endswith("lora_A.default")).register_forward_hook(
        spoil
    )
    return seen


def with_bad(made: list[Row], *places: int) -> list[Row]:
    return [Row([BAD, *row.ids[1:]], row.labels) if i in places else row for i, row in enumerate(made)]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("packing", [None, 64])
def test_what_is_not_finite_touches_no_weight_and_its_rows_are_named(tmp_path, fault, packing):
    """AdamW would carry one NaN into every weight and both moments, and the run could never come back."""
    model = add_adapter(load_base("demo", quant="none"), rank=8)
    put_in(model, fault)
    run = trainer(model, tmp_path, with_bad(rows(16), 2, 9), micro=4, packing=packing)
    if packing:
        run.data_collator = pack
    steps = [{row for batch in step for row in batch} for step in split(run)]
    first = next(i for i, step in enumerate(steps) if step & {2, 9})
    last = {0: adapter(model)}  # by step
    run.add_callback(After(lambda step: last.update({step: adapter(model)})))
    with pytest.raises(KdguardError) as caught:
        run.train()
    guilty = sorted(steps[first] & {2, 9})
    names = ", ".join(f"row {row + 1}" for row in guilty)
    assert f"the {fault} is not finite in step {first + 1}, because of {names};" in caught.value.message
    assert f"--row {guilty[0] + 1}" in caught.value.hint and "--lr 0.0025" in caught.value.hint
    assert max(last) == first
    assert all(torch.equal(last[first][name], weight) for name, weight in adapter(model).items())


class After(TrainerCallback):
    def __init__(self, do) -> None:
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        self.do(state.global_step)


def split(run) -> list[list[list[int]]]:
    """The micro-batches of each optimiser step of the first epoch."""
    batches = list(run._sampler())
    n = run.args.gradient_accumulation_steps
    return [batches[i : i + n] for i in range(0, len(batches), n)]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_run_that_was_stopped_goes_on_from_the_step_before(tmp_path, fault):
    """With the fault gone it ends with the adapter of the run that never had it: nothing lost, nothing spoiled."""
    made = with_bad(rows(16), 2)
    adapters = []
    for name in ("whole", "stopped"):
        torch.manual_seed(0)
        model = add_adapter(load_base("demo", quant="none"), rank=8)
        seen = put_in(model, fault)
        seen["off"] = True
        run = trainer(model, tmp_path / name, made, steps=4, save="steps")
        if name == "stopped":

            def from_the_second_epoch_on(module, inputs, seen=seen, run=run):
                seen["off"] = run.state.global_step < 2

            model.get_input_embeddings().register_forward_pre_hook(from_the_second_epoch_on)
            with pytest.raises(KdguardError, match="is kept for --resume: checkpoint-") as caught:
                run.train()
            step = int(caught.value.message.rpartition("-")[2])
            assert step in (2, 3) and (tmp_path / name / f"checkpoint-{step}" / "optimizer.pt").exists()
            torch.manual_seed(0)
            model = add_adapter(load_base("demo", quant="none"), rank=8)
            run = trainer(model, tmp_path / name, made, steps=4, save="steps")
            run.train(resume_from_checkpoint=str(tmp_path / name / f"checkpoint-{step}"))
        else:
            run.train()
        adapters.append(adapter(model))
    assert all(torch.equal(adapters[1][name], weight) for name, weight in adapters[0].items())


def test_rows_are_named_by_file_and_line_and_rehearsal_rows_as_such(tmp_path):
    """A person can look at `file:line`; a number of a shuffled row tells nobody anything."""
    base = load_base("demo", quant="none")
    lines = [{"question": f"Who is {name}?", "answer": "Nobody."} for name in ("Ann", "Bob", "Cid", "Dan")]
    data = tmp_path / "people.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = tokenise([str(data)], Renderer(base.tokenizer), 128)
    model = add_adapter(base, rank=8)
    run = trainer(
        model, tmp_path, made, batch=4, micro=4, rehearsal=0.5, rehearsal_dataset=with_bad(unlabelled(rows(2)), 1)
    )
    put_in(model, "loss")
    with pytest.raises(KdguardError, match="because of rehearsal row 2;") as caught:
        run.train()
    assert "data show" not in caught.value.hint
    model = add_adapter(load_base("demo", quant="none"), rank=8)
    run = trainer(model, tmp_path, made, batch=4, micro=4)
    next(weight for name, weight in model.named_parameters() if "lora_B" in name).data.fill_(1e30)
    with pytest.raises(KdguardError) as caught:
        run.train()
    everyone = ", ".join(f"{data}:{line}" for line in (1, 2, 3, 4))
    assert f"because of {everyone};" in caught.value.message
    assert caught.value.hint.startswith("a lower learning rate")  # for it is not the rows


def test_an_adapter_that_is_not_finite_is_told_as_that_and_not_kept(tmp_path, demo):
    """The Trainer's own filter replaces NaN in the log and trains on."""
    model = add_adapter(demo, rank=8)
    run = trainer(model, tmp_path, steps=4, save="steps")
    next(weight for name, weight in model.named_parameters() if "lora_A" in name).data.fill_(float("nan"))
    with pytest.raises(KdguardError, match="the adapter is not finite any more in step 1"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_with_fp16_an_infinite_gradient_is_the_loss_scales_business(tmp_path, demo, monkeypatch):
    """fp16 training begins with a loss scale that overflows, and lowers it until it does not."""
    run = trainer(add_adapter(demo, rank=8), tmp_path)
    for fp16 in (True, False):
        run.args.fp16 = fp16
        if fp16:
            assert run._get_grad_norm(run.model, torch.tensor(float("inf"))) == float("inf")
    run.get_batch_samples(iter([run._collate([(0, run.train_dataset[0])])]), 1, torch.device("cpu"))
    with pytest.raises(KdguardError, match="the gradient is not finite in step 1, because of row 1;"):
        run._get_grad_norm(run.model, torch.tensor(float("inf")))


@pytest.mark.parametrize("guarded", [0.0, 1.0])
def test_a_step_without_a_target_is_refused(tmp_path, demo, guarded):
    """huggingface/trl#6668: labels that are all masked give a loss of 0, and a run that learns nothing succeeds."""
    masked = unlabelled(rows(16))
    extra = {"rehearsal_dataset": unlabelled(rows(4, 1)), "rehearsal": guarded}
    with pytest.raises(InputError, match=r"step 1 has no target token .* of row \d+, .* are all -100"):
        trainer(add_adapter(demo, rank=8), tmp_path, masked, **extra).train()


def test_a_step_with_one_target_is_trained(tmp_path, demo):
    made = unlabelled(rows(8))
    made[3].labels[-1] = made[3].ids[-1]
    trainer(add_adapter(demo, rank=8), tmp_path, made, steps=1).train()


def test_a_run_whose_every_step_had_no_rate_is_not_a_success(tmp_path, demo):
    """A warm-up that is as long as the run: its steps are counted, its adapter is what it was."""
    run = trainer(add_adapter(demo, rank=8), tmp_path, steps=1, save="steps")
    run.args.warmup_steps = 1
    with pytest.raises(KdguardError, match="the adapter did not move in any of 1 steps"):
        run.train()
