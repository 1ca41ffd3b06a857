"""Packed rows: one forward for many of them, and the same training as with each row by itself."""

import json
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, OPTConfig, TrainingArguments

from kdguard.config import TuneConfig
from kdguard.data import IGNORE
from kdguard.data.batches import Collator, pack
from kdguard.data.tokens import Row
from kdguard.events import Events
from kdguard.guard.kept import KeptStates
from kdguard.guard.teacher import Guard, count, install
from kdguard.guard.trainer import GuardedTrainer, MixedBatchSampler
from kdguard.model.load import add_adapter, load_base
from kdguard.model.packing import keeps_rows_apart
from kdguard.tuning import tune
from tests.conftest import ARCHITECTURES, SMALL, byte_tokenizer
from tests.guard.test_trainer import adapter, rows, unlabelled


def tuned(base):
    """An adapter that already says something other than the base."""
    torch.manual_seed(0)
    model = add_adapter(base, rank=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def short_rows(*lengths: int) -> list[Row]:
    """Of a tiny vocabulary; every second one is a rehearsal row."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(10, 250, (length,), generator=generator).tolist() for length in lengths]
    return [
        Row(ids, [IGNORE] * (len(ids) if i % 2 else 3) + ids[len(ids) if i % 2 else 3 :]) for i, ids in enumerate(made)
    ]


def loss_and_gradients(model, batches, counts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = sum(model(**batch, counts=counts)["loss"] for batch in batches)
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pack_has_the_loss_and_the_gradients_of_its_rows_one_by_one(tiny, tmp_path, architecture):
    """With a live teacher, with one whose states are kept for some of the rows, and with all of them kept. The rows
    are longer than a sliding window: it, too, must count from the start of its own row."""
    base = load_base(str(tiny(architecture)))
    if getattr(base.model.config, "sliding_window", None):
        base.model.config.sliding_window = 8
    model = tuned(base)
    made = short_rows(20, 13, 31, 5, 4)
    kept = KeptStates(tmp_path / "teacher.states", [len(row.ids) for row in made], "a")
    install(model, Guard(), kept)
    counts = tuple(count(Collator(0)(made)))
    loss, gradients = loss_and_gradients(model, [Collator(0)([row]) for row in made], counts)
    assert all(gradient.any() for gradient in gradients.values())
    model(**pack([made[1], made[4]]), row_ids=torch.tensor([1, 4]), counts=counts)
    assert kept.have == {1, 4}
    for row_ids in (None, torch.arange(5), torch.arange(5)):
        packed_loss, packed = loss_and_gradients(model, [pack(made) | {"row_ids": row_ids}], counts)
        torch.testing.assert_close(packed_loss, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-6)
    assert kept.have == set(range(5))


def test_a_row_does_not_know_its_neighbours(demo):
    model = tuned(demo)
    install(model, Guard(weight=0.0))
    row, *others = rows(4)
    losses = []
    for before, after in ((0, 0), (1, 0), (2, 1), (0, 3)):
        made = [*unlabelled(others[:before]), row, *unlabelled(others[:after])]
        losses.append(model(**pack(made), counts=(row.targets, 1))["loss"].detach())
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_no_row_predicts_the_first_token_of_the_next():
    """Not even where a collator of somebody's own has left that token a target."""
    made = [Row(row.ids, row.ids) for row in rows(5)]
    packed = pack(made)
    theirs = packed | {"labels": packed["input_ids"]}
    alone = Collator(0)(made)
    assert count(packed).tolist() == count(theirs).tolist() == count(alone).tolist()


LENGTHS = torch.randint(5, 60, (57 + 40,), generator=torch.Generator().manual_seed(0)).tolist()


def sampler(packing: int | None, ratio: float, *, rows: int = 57, **processes: int) -> MixedBatchSampler:
    """Three epochs in steps of 16 training rows; the last step of an epoch may have fewer."""
    return MixedBatchSampler(
        LENGTHS[:rows],
        LENGTHS[57:],
        batch_size=2,
        accumulation=8,
        ratio=ratio,
        seed=3,
        packing=packing,
        epochs=3,
        **processes,
    )


def steps(sampled: MixedBatchSampler) -> list[list[list[int]]]:
    """The micro-batches of each optimiser step, as transformers counts them off."""
    micro_batches = list(sampled)
    assert len(micro_batches) == len(sampled) and all(micro_batches)
    return [micro_batches[i : i + sampled.accumulation] for i in range(0, len(sampled), sampled.accumulation)]


def tokens(sampled: MixedBatchSampler) -> list[int]:
    return [sum(sampled.lengths[row] for row in rows) for rows in sampled]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0, 2.0])
@pytest.mark.parametrize("packing", [1, 90, 200, 10_000])
@pytest.mark.parametrize("rows", [48, 49, 57])
def test_a_packed_step_has_the_rows_it_had_and_keeps_to_its_tokens(ratio, packing, rows):
    padded, packed, again = (sampler(most, ratio, rows=rows) for most in (None, packing, packing))
    for epoch in range(3):
        for each in (padded, packed, again):
            each.set_epoch(epoch)
        assert list(packed) == list(again)
        found, wanted = ([sorted(chain(*step)) for step in steps(each)] for each in (packed, padded))
        assert found == wanted
        # 1 is less than any row has: each is by itself then, where the share of rehearsal rows is whole.
        assert max(tokens(packed)) <= max(packing, *LENGTHS) or (packing, ratio) == (1, 0.25)


def test_a_step_is_split_no_more_than_its_tokens_ask_for():
    assert sampler(10_000, 1.0).accumulation == 1
    packed = sampler(200, 1.0)
    packed.accumulation -= 1
    most = 0
    for epoch in range(3):
        packed.set_epoch(epoch)
        most = max(most, *tokens(packed))
    assert most > 200


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_processes_share_packed_steps_and_lose_no_row(ratio):
    shares = [sampler(90, ratio, processes=2, rank=rank) for rank in range(2)]
    alone = MixedBatchSampler(LENGTHS[:57], LENGTHS[57:], batch_size=4, accumulation=8, ratio=ratio, seed=3)
    first, second = map(steps, shares)
    assert len(first) == len(second) == len(steps(alone))
    for mine, others, whole in zip(first, second, steps(alone), strict=True):
        assert len(mine) == len(others)
        assert sorted(chain(*mine, *others)) == sorted(chain(*whole))
        assert all(sum(LENGTHS[row] for row in rows) <= 90 for rows in mine + others)


def trainer(model, out, packing: int | None, *, steps: int, **kwargs) -> GuardedTrainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    return GuardedTrainer(
        model,
        arguments,
        train_dataset=rows(20),
        data_collator=pack if packing else Collator(0),
        rehearsal_dataset=unlabelled(rows(12, 1)),
        rehearsal=1.0,
        packing=packing,
        **kwargs,
    )


def losses(run: GuardedTrainer) -> list[tuple[float, float, float]]:
    return [(entry["ce"], entry["kl"], entry["grad_norm"]) for entry in run.state.log_history if "ce" in entry]


def test_training_is_that_of_padded_rows(tmp_path):
    """An epoch and a half, with a short step at its end; the optimiser's steps and their losses are the same."""
    found = {}
    for packing in (None, 120):
        run = trainer(tuned(load_base("demo")), tmp_path / str(packing), packing, steps=5)
        run.train()
        found[packing] = run
    assert (found[None].args.gradient_accumulation_steps, found[120].args.gradient_accumulation_steps) == (4, 3)
    assert len(losses(found[120])) == 5
    torch.testing.assert_close(losses(found[120]), losses(found[None]), rtol=1e-3, atol=1e-5)
    padded, packed = (adapter(run.model) for run in found.values())
    for name, weight in padded.items():
        torch.testing.assert_close(packed[name], weight, rtol=1e-2, atol=1e-4)


def test_a_packed_run_that_was_stopped_goes_on_with_the_same_losses(tmp_path):
    """In the middle of its second epoch: transformers passes over as many micro-batches as it has trained."""
    whole = trainer(tuned(load_base("demo")), tmp_path / "whole", 120, steps=8)
    whole.train()
    stopped = trainer(tuned(load_base("demo")), tmp_path / "stopped", 120, steps=4)
    stopped.train()
    resumed = trainer(tuned(load_base("demo")), tmp_path / "stopped", 120, steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    torch.testing.assert_close(losses(resumed), losses(whole), rtol=1e-5, atol=1e-6)


def test_the_arguments_of_a_trainer_are_not_touched(tmp_path, demo):
    """Made of the same arguments, another trainer has the same rows in a step."""
    run = trainer(add_adapter(demo, rank=4), tmp_path, 10_000, steps=1)
    assert run.args.gradient_accumulation_steps == 1
    again = GuardedTrainer(run.model, run.args, train_dataset=rows(20), data_collator=pack, packing=10_000)
    assert again.args is not run.args


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_of_attention_keep_packed_rows_apart(tiny, architecture):
    assert keeps_rows_apart(load_base(str(tiny(architecture))).model, short_rows(20, 13))


NOT_APART = {
    # Its attention mask is made without the positions.
    "opt": OPTConfig(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64),
    # Its state-space layers carry their state on into the next row.
    "bamba": BambaConfig(**SMALL, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=32),
}


@pytest.mark.parametrize("architecture", NOT_APART)
def test_a_model_that_does_not_keep_rows_apart_is_found_and_its_rows_are_padded(tmp_path, architecture):
    config, tokenizer = NOT_APART[architecture], byte_tokenizer()
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"Who is {i}?", "answer": f"Number {i}"}) + "\n" for i in range(4)))
    base = load_base(str(tmp_path / "model"))
    assert not keeps_rows_apart(base.model, short_rows(20, 13))
    config = TuneConfig(data=data, model=str(tmp_path / "model"), out=tmp_path / "run")
    assert tune(config, Events(), dry_run=True)["plan"]["packing"] is None


@pytest.mark.parametrize("batch", (1, 2, 4))
@pytest.mark.parametrize("ratio", (0.1, 0.3, 0.6))
@pytest.mark.parametrize("processes", (1, 3, 8))
def test_a_share_of_a_rehearsal_row_leaves_the_count_of_micro_batches_right(batch, ratio, processes):
    """transformers counts steps by the sampler's length: were it longer than what comes, steps would run together."""
    make = [
        MixedBatchSampler(
            [100] * 97, [100] * 50, batch_size=batch, ratio=ratio, processes=processes, rank=rank, packing=100
        )
        for rank in range(processes)
    ]
    for sampler in make:
        micro_batches = list(sampler)
        assert len(micro_batches) == len(sampler) and all(micro_batches)
