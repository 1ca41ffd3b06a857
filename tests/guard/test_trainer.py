"""GuardedTrainer on the embedded model: the real Trainer, PEFT and bitsandbytes."""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from kdguard.data import IGNORE
from kdguard.data.batches import Collator
from kdguard.data.tokens import Row
from kdguard.demo import MODEL
from kdguard.errors import InputError, KdguardError
from kdguard.guard.teacher import Guard, install
from kdguard.guard.trainer import GuardedTrainer, MixedBatchSampler
from kdguard.model.load import add_adapter, base_view, load_base
from kdguard.probes.answer import generate


def rows(n: int, seed: int = 0) -> list[Row]:
    """Rows of uneven length with one to six targets at their end."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        length = int(torch.randint(8, 24, (1,), generator=generator))
        targets = int(torch.randint(1, 7, (1,), generator=generator))
        ids = torch.randint(300, 2000, (length,), generator=generator).tolist()
        made.append(Row(ids, [IGNORE] * (length - targets) + ids[-targets:]))
    return made


def unlabelled(made: list[Row]) -> list[Row]:
    return [Row(row.ids, [IGNORE] * len(row.ids)) for row in made]


def trainer(
    model, out, train=None, *, micro=8, batch=8, steps=2, lr=1e-2, optim="adamw_torch", save="no", **kwargs
) -> GuardedTrainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        learning_rate=lr,
        optim=optim,
        max_grad_norm=0,
        use_cpu=True,
        save_strategy=save,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    return GuardedTrainer(model, arguments, train_dataset=train or rows(16), data_collator=Collator(0), **kwargs)


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def test_splitting_a_step_into_uneven_micro_batches_changes_nothing(tmp_path):
    """Rows differ in length and targets, so per-micro-batch means would differ: only counts of the step agree."""
    after = []
    for micro in (8, 4, 2):
        torch.manual_seed(0)
        model = add_adapter(load_base("demo", quant="none"), rank=8)
        extra = unlabelled(rows(8, 1))
        run = trainer(model, tmp_path, micro=micro, lr=1.0, optim="sgd", rehearsal_dataset=extra, rehearsal=0.5)
        run.train()
        after.append(adapter(model))
    for other in after[1:]:
        for name, weight in after[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


def test_gradients_equal_those_of_the_equation(tmp_path, demo):
    """One step of plain SGD through the Trainer moves the adapter by the gradient of METHOD's loss, autograd's own."""
    torch.manual_seed(0)
    model = add_adapter(demo, rank=8)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    twin = copy.deepcopy(adapter(model))
    batch = Collator(0)(rows(8))
    run = trainer(model, tmp_path, guard=Guard(weight=8.0))
    run.compute_loss(model, batch).backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    model.zero_grad()
    mask = batch["attention_mask"][:, 1:].bool()
    labels = batch["labels"][:, 1:][mask]
    with base_view(model):
        teacher = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1][mask]
    student = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1][mask]
    at = labels != IGNORE
    ce = torch.nn.functional.cross_entropy(student, labels, ignore_index=IGNORE)
    gold = torch.zeros_like(student, dtype=torch.bool)
    gold[at, labels[at]] = True
    p, q = (z.masked_fill(gold, -1e9).log_softmax(-1) for z in (teacher, student))
    (ce + 2.0 * (p.exp() * (p - q)).sum() / len(q)).backward()
    assert set(twin) == set(ours)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(ours[name], weight.grad, rtol=1e-3, atol=1e-6)


def test_probing_before_training_leaves_training_unharmed(tmp_path, renderer, demo):
    """bitsandbytes repacks a 4-bit weight on the first eval-mode, no-grad forward on CPUs with AVX512-BF16; backward
    through a repacked weight silently gives its input no gradient, so the lowest layers would never move."""
    layer = next(module for module in demo.model.modules() if type(module).__name__ == "Linear4bit")
    if not type(layer)(64, 64).support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    generate(demo.model, renderer, [renderer.prompt("What is the capital of France?")], max_new_tokens=2)
    model = add_adapter(demo, rank=8)
    trainer(model, tmp_path).train()
    assert lowest_moved(model)


@pytest.mark.filterwarnings("ignore:.*gemv_4bit:UserWarning")
def test_without_the_remedy_probing_does_harm_training(tmp_path, renderer, demo):
    """Keeps the test above honest: if this fails, bitsandbytes was mended and the remedy can go."""
    for module in demo.model.modules():
        if type(module).__name__ == "Linear4bit":
            fresh = type(module)(64, 64)
            module.support_avx512bf16_for_cpu = fresh.support_avx512bf16_for_cpu
    if not fresh.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    generate(demo.model, renderer, [renderer.prompt("What is the capital of France?")], max_new_tokens=2)
    model = add_adapter(demo, rank=8)
    with pytest.raises(KdguardError, match="did not move"):
        trainer(model, tmp_path).train()


def lowest_moved(model) -> bool:
    return all(weight.any() for name, weight in model.named_parameters() if "layers.0." in name and "lora_B" in name)


LENGTHS = [5, 9, 3, 7, 12, 4, 8, 6, 11, 10, *range(3, 16)]


def sampler(ratio: float, batch_size: int = 4, accumulation: int = 1, **processes: int) -> MixedBatchSampler:
    """Over ten training rows and thirteen rehearsal rows."""
    return MixedBatchSampler(
        LENGTHS[:10], LENGTHS[10:], batch_size=batch_size, accumulation=accumulation, ratio=ratio, seed=3, **processes
    )


def test_plain_and_guarded_see_the_same_rows_in_the_same_order():
    plain = [set(rows) for rows in sampler(0.0)]
    guarded = [{row for row in rows if row < 10} for rows in sampler(1.0)]
    assert plain == guarded


def test_no_rehearsal_row_comes_twice_before_all_came_once():
    mixed = sampler(0.5)
    seen = []
    for epoch in range(4):
        mixed.set_epoch(epoch)
        seen += [row - 10 for rows in mixed for row in rows if row >= 10]
    assert len(seen) == 4 * 10 * 0.5
    counts = [seen.count(row) for row in range(13)]
    assert set(counts) == {1, 2}


def test_every_training_row_comes_once_an_epoch_in_another_order():
    plain = sampler(0.0)
    first = [row for rows in plain for row in rows]
    plain.set_epoch(1)
    second = [row for rows in plain for row in rows]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_processes_share_a_step_and_lose_no_row():
    """accelerate's own sharding drops every batch that is not of the declared size, rehearsal rows and all."""
    alone = list(sampler(0.5, batch_size=4))
    shares = [list(sampler(0.5, batch_size=2, processes=2, rank=rank)) for rank in range(2)]
    assert [len(share) for share in shares] == [len(alone)] * 2
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(row for part in parts for row in part) == sorted(whole)
        assert all(parts)


def test_a_last_step_of_fewer_rows_than_processes_weighs_them_alike():
    """No process may go without a forward; a row that is given twice beside one given once would count double."""
    shares = [list(sampler(0.0, batch_size=3, accumulation=1, processes=3, rank=rank))[-1] for rank in range(3)]
    assert all(shares) and len({row for share in shares for row in share}) == 1  # the tenth of ten
    six = MixedBatchSampler(LENGTHS[:10], [], batch_size=1, processes=4, rank=0, seed=3)
    given = [row for rank in range(4) for row in list(_of_rank(six, rank))[-1]]
    assert len(given) == 4 and sorted(map(given.count, given)) == [2] * 4


def _of_rank(sampler: MixedBatchSampler, rank: int) -> MixedBatchSampler:
    sampler.rank = rank
    return sampler


def test_a_step_is_sorted_by_length_before_it_is_split():
    """Rows of one length share a micro-batch, so less is padded; the step as a whole holds the same rows."""
    whole = [set(rows) for rows in sampler(0.5, batch_size=8)]
    split = list(sampler(0.5, batch_size=2, accumulation=4))
    assert [set().union(*split[:4]), set().union(*split[4:])] == whole
    lengths = [LENGTHS[row] for rows in split[:4] for row in rows]
    assert lengths == sorted(lengths)
    assert len(split) == len(sampler(0.5, batch_size=2, accumulation=4)) == 5


def test_a_guarded_model_generates_as_before(demo):
    """generate() reads the signature of forward: without position_ids in it, left-padded prompts are asked otherwise
    after tuning than before."""
    before = inspect.signature(demo.model.forward), demo.model._supports_logits_to_keep()
    install(add_adapter(demo, rank=4), Guard())
    assert (inspect.signature(demo.model.forward), demo.model._supports_logits_to_keep()) == before


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
def test_a_trained_head_is_refused(tmp_path):
    """Teacher and student share the head; one that is trained would make the teacher drift with the student."""
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(InputError, match="output head"):
        trainer(model, tmp_path)


def test_evaluating_on_the_way_leaves_the_log_of_training_as_it_was(tmp_path):
    """A script that swaps the class evaluates too: what that sums up must not be told as training's."""
    logs = []
    for evaluate in ("no", "steps"):
        torch.manual_seed(0)
        model = add_adapter(load_base("demo", quant="none"), rank=8)
        run = trainer(model, tmp_path, eval_dataset=rows(4, 2))
        run.args.eval_strategy, run.args.eval_steps = evaluate, 1
        run.train()
        logs.append([{key: log[key] for key in ("ce", "kl")} for log in run.state.log_history if "ce" in log])
        assert any("eval_loss" in log for log in run.state.log_history) == (evaluate == "steps")
    assert logs[0] == logs[1]


def test_columns_that_the_model_does_not_read_are_left_out(tmp_path, demo):
    """transformers' Trainer leaves them out, and a collator cannot make a tensor of a question."""
    made = [{"input_ids": row.ids, "labels": row.labels, "question": "Who?"} for row in rows(16)]
    run = trainer(add_adapter(demo, rank=8), tmp_path, train=made)
    run.args.remove_unused_columns = True
    seen = []

    def collate(features):
        seen.extend(set(feature) for feature in features)
        return Collator(0)([Row(feature["input_ids"], feature["labels"]) for feature in features])

    run.data_collator = collate
    run.train()
    assert seen and all(columns == {"input_ids", "labels"} for columns in seen)
