"""Out of memory, wherever it happens: the run goes on with less, and its steps stay what they were."""

import functools
import json
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaConfig, LlamaModel, TrainingArguments

from kdguard.__main__ import main
from kdguard.config import TuneConfig
from kdguard.data import IGNORE
from kdguard.data.batches import UNKEPT, Collator, pack, pieces, row_lengths
from kdguard.data.tokens import Renderer, Row
from kdguard.errors import OutOfMemory
from kdguard.events import Events, read_events
from kdguard.guard import lean as lean_module
from kdguard.guard import teacher as teacher_module
from kdguard.guard.checkpoint import last_whole
from kdguard.guard.lean import Lean
from kdguard.guard.rehearsal import rehearse
from kdguard.guard.teacher import count, drift
from kdguard.guard.trainer import GuardedTrainer
from kdguard.model.load import Base, load_base
from kdguard.model.memory import at_once, forget, in_batches, ran_out
from kdguard.probes.answer import ask
from kdguard.probes.packs import PACKS, load_probes
from kdguard.terminal import Terminal
from kdguard.tuning import tune
from kdguard.ui.progress import progress
from tests.guard.test_packing import tuned
from tests.guard.test_trainer import adapter, rows, unlabelled
from tests.test_cli import DATA
from tests.test_terminal import screen


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Batches as large as at the start of a process; and no collection, which takes half a second, for none is needed:
    what an error held is free without."""
    monkeypatch.setattr("kdguard.model.memory.clear_device_cache", lambda **how: None)
    monkeypatch.setattr(at_once, "cache", 2**30)
    monkeypatch.setattr(at_once, "tell", lambda what, cache: None)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")


def some_rows(n: int, seed: int) -> list[Row]:
    """Of 8 to 23 tokens, with one to six targets at their end; of a tiny vocabulary."""
    small = [[1 + token % 255 for token in row.ids] for row in rows(n, seed)]
    return [
        Row(ids, [IGNORE] * (len(ids) - row.targets) + ids[-row.targets :])
        for ids, row in zip(small, rows(n, seed), strict=True)
    ]


def trainer(model, out, *, packing: int | None = None, steps: int = 5, **kwargs) -> GuardedTrainer:
    """Five steps of 8 training and 8 rehearsal rows, over one and a half epochs, in two or more micro-batches."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        logging_steps=1,
        save_steps=100,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    return GuardedTrainer(
        model,
        arguments,
        train_dataset=kwargs.pop("train_dataset", some_rows(24, 0)),
        data_collator=pack if packing else Collator(0),
        rehearsal_dataset=unlabelled(some_rows(24, 1)),
        rehearsal=1.0,
        packing=packing,
        **kwargs,
    )


def model_of(tiny):
    """An adapter on a tiny Llama in fp32."""
    return tuned(load_base(str(tiny("llama")), quant="none"))


def losses(run: GuardedTrainer) -> list[tuple[float, ...]]:
    return [
        (entry["loss"], entry["ce"], entry["kl"], float(entry["grad_norm"]))
        for entry in run.state.log_history
        if "ce" in entry
    ]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """`undisturbed(packing)` -> the losses and the adapter of a run that has all the memory it wants."""

    @functools.cache
    def run(packing: int | None):
        out = tmp_path_factory.mktemp("whole")
        whole = trainer(model_of(tiny), out, packing=packing, lean=Lean(logits=SMALL))
        whole.train()
        return losses(whole), adapter(whole.model)

    return run


SMALL = 2**16  # so that there is a rung for the loss


class Fault:
    """Memory runs out in the last micro-batch of one step, as long as `still` says so of the run."""

    STEP = 3

    def __init__(self, run: GuardedTrainer, still: Callable[[GuardedTrainer], bool]) -> None:
        self.run, self.still, self.times = run, still, 0

    def __call__(self) -> None:
        step = self.run._step
        now = self.run.state.global_step + 1 == self.STEP and step.begun == len(step.micro_batches)
        if now and self.still(self.run):
            self.times += 1
            out_of_memory()


def in_teacher(monkeypatch, fault: Fault) -> None:
    _in_decoder(monkeypatch, fault, graded=False)


def in_student(monkeypatch, fault: Fault) -> None:
    _in_decoder(monkeypatch, fault, graded=True)


def _in_decoder(monkeypatch, fault: Fault, graded: bool) -> None:
    decoder = fault.run.model.get_base_model().get_decoder()

    def hook(module, inputs, output):
        if torch.is_grad_enabled() is graded:
            fault()

    decoder.layers[-1].register_forward_hook(hook)


def in_loss(monkeypatch, fault: Fault) -> None:
    real = teacher_module.guard_loss
    monkeypatch.setattr(teacher_module, "guard_loss", lambda *args, **how: (real(*args, **how), fault())[0])


def in_backward(monkeypatch, fault: Fault) -> None:
    """Below the uppermost layer, so that some weights have their gradients already and others have not."""

    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: fault())

    fault.run.model.get_base_model().get_decoder().layers[-2].register_forward_hook(hook)


PHASES = {"teacher": in_teacher, "student": in_student, "loss": in_loss, "backward": in_backward}
STILL = {"once": lambda run: not run.lean.done, "to the foot": lambda run: not run.lean.offload}


@pytest.mark.parametrize("still", STILL)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("packing", "keep"), [(None, False), (None, True), (120, True)])
def test_a_step_that_memory_runs_out_in_is_begun_anew(
    tiny, tmp_path, monkeypatch, undisturbed, phase, still, packing, keep
):
    """The losses before are the same to the bit; after it, and the adapter, but for rounding."""
    monkeypatch.setattr(lean_module, "LOGITS", SMALL)
    said = []
    run = trainer(
        model_of(tiny),
        tmp_path,
        packing=packing,
        keep_teacher=keep,
        lean=Lean(logits=SMALL),
        on_step_down=lambda what, step: said.append((what, step)),
    )
    fault = Fault(run, STILL[still])
    PHASES[phase](monkeypatch, fault)
    run.train()
    found, whole = losses(run), undisturbed(packing)[0]
    assert len(found) == len(whole) == 5 and run.state.global_step == 5
    assert fault.times == len(said) and all(step == Fault.STEP for _, step in said)
    if still == "once":
        assert [what for what, _ in said] == ["the loss in chunks of a quarter"]
    else:
        assert run.lean.tokens and run.lean.checkpointing and len(said) >= 4
        assert said[-1][0] == "activation checkpoints in the computer's memory"
    before = Fault.STEP - 1
    assert found[:before] == whole[:before]
    torch.testing.assert_close(found, whole, rtol=2e-3, atol=1e-5)
    for name, weight in undisturbed(packing)[1].items():
        torch.testing.assert_close(adapter(run.model)[name], weight, rtol=1e-2, atol=2e-4)


def in_clipping(monkeypatch, fault: Fault) -> None:
    real = fault.run.accelerator.clip_grad_norm_
    monkeypatch.setattr(fault.run.accelerator, "clip_grad_norm_", lambda *args: (fault(), real(*args))[1])


def in_optimiser(monkeypatch, fault: Fault) -> None:
    """After all weights have moved."""
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: (real(self, closure), fault())[0])


@pytest.mark.parametrize(("phase", "step"), [(in_clipping, 3), (in_optimiser, 1)])
def test_clipping_and_the_first_step_of_the_optimiser_are_done_once_more(
    tiny, tmp_path, monkeypatch, undisturbed, phase, step
):
    """An optimiser makes its state in its first step: the weights are put back, and the state is made anew."""
    said = []
    run = trainer(model_of(tiny), tmp_path, lean=Lean(logits=SMALL), on_step_down=lambda what, step: said.append(what))
    fault = Fault(run, lambda run: not said)
    fault.STEP = step
    phase(monkeypatch, fault)
    run.train()
    assert fault.times == 1 and "once more" in said[0]
    assert losses(run) == undisturbed(None)[0]
    for name, weight in undisturbed(None)[1].items():
        assert torch.equal(adapter(run.model)[name], weight)


def test_an_optimiser_that_runs_out_later_ends_the_run(tiny, tmp_path, monkeypatch):
    """Some weights may have moved and others not: it goes on from a checkpoint, and none is made of these."""
    run = trainer(model_of(tiny), tmp_path)
    in_optimiser(monkeypatch, Fault(run, lambda run: True))
    with pytest.raises(OutOfMemory, match="in the optimiser, in step 3"):
        run.train()
    assert last_whole(tmp_path) is None


LONG = 30


def over(longest: int) -> Callable:
    """More tokens at once do not fit into training, however they are run."""

    def inject(monkeypatch, run: GuardedTrainer) -> None:
        def look(module, args, inputs):
            if module.training and inputs["input_ids"].shape[-1] > longest:
                out_of_memory()

        run.model.get_base_model().get_decoder().register_forward_pre_hook(look, with_kwargs=True)

    return inject


def test_a_row_that_does_not_fit_is_cut_only_with_consent(tiny, tmp_path, monkeypatch):
    """Without it the run ends after a checkpoint of its last whole step, from which one with consent goes on."""
    long = Row([7] * (LONG - 4) + [8, 9, 10, 11], [IGNORE] * (LONG - 2) + [10, 11])
    train = [*some_rows(23, 0), long]
    run = trainer(model_of(tiny), tmp_path, train_dataset=train)
    over(24)(monkeypatch, run)
    with pytest.raises(OutOfMemory, match="with a single row of 30 tokens, after at most") as error:
        run.train()
    met = run.state.global_step + 1
    assert 1 < met <= 3 and "--max-length" in error.value.hint
    assert last_whole(tmp_path) == tmp_path / f"checkpoint-{met - 1}"

    said = []
    again = trainer(
        model_of(tiny), tmp_path, train_dataset=train, shorten=True, on_step_down=lambda what, step: said.append(what)
    )
    over(24)(monkeypatch, again)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert again.lean.longest == 22 and said[-1] == "rows cut to their last 22 tokens"


def test_a_cut_row_keeps_its_last_target_and_its_kept_states_are_not_asked_for():
    ids = list(range(1, 21))
    made = [Row(ids[:5], [IGNORE] * 3 + [4, 5]), Row(ids, [IGNORE] * 10 + [11, 12] + [IGNORE] * 8)]
    for batch in (Collator(0)(made), pack(made)):
        (piece,) = pieces(batch | {"row_ids": torch.tensor([3, 4])}, longest=6)
        assert row_lengths(piece) == [5, 6] and piece["row_ids"].tolist() == [3, UNKEPT]
        assert piece["input_ids"].flatten()[-6:].tolist() == ids[6:12]
        assert count(piece).tolist() == [4, 9]


@pytest.mark.parametrize("tokens", [1, 20, 47, 60, 1000])
def test_pieces_have_the_rows_of_their_batch_and_keep_to_their_tokens(tokens):
    made = sorted(some_rows(9, 0), key=lambda row: len(row.ids))
    for batch in (Collator(0)(made), pack(made)):
        found = pieces(batch | {"row_ids": torch.arange(9)}, tokens)
        assert torch.cat([piece["row_ids"] for piece in found]).tolist() == list(range(9))
        assert sum(map(count, found)).tolist() == count(batch).tolist()
        for piece in found:
            assert piece["input_ids"].numel() <= tokens or len(piece["row_ids"]) == 1
            assert piece.keys() - {"row_ids"} == batch.keys()


def test_one_of_several_processes_does_not_step_down_alone(tiny, tmp_path, monkeypatch):
    """The others would wait for its gradients for ever."""
    run = trainer(model_of(tiny), tmp_path)
    in_student(monkeypatch, Fault(run, lambda run: True))
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    with pytest.raises(OutOfMemory, match="process 0"):
        run.train()
    assert not run.lean.done


class Memory(TorchDispatchMode):
    """Counts the bytes of live tensors that were made within it, and lets none go beyond `cap`."""

    def __init__(self, cap: float = float("inf")) -> None:
        super().__init__()
        self.cap, self.live, self.peak = cap, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        if self.live > self.cap:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.live} of {self.cap:.0f} bytes")
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class Elsewhere(saved_tensors_hooks):
    """Stands in for `save_on_cpu`: what is packed is no tensor, so no byte of the memory that is counted."""

    packed = 0

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        super().__init__(self.pack, lambda array: torch.from_numpy(array).clone())

    def pack(self, tensor: torch.Tensor):
        type(self).packed += tensor.nbytes
        return tensor.detach().numpy().copy()


LAYERS, HIDDEN, LENGTH = 3, 32, 192


@pytest.fixture
def in_memory(tmp_path, monkeypatch):
    """`in_memory(lean, cap)` -> the memory and the trainer of two steps of 4 rows of LENGTH tokens."""
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Elsewhere)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(lean_module, "LOGITS", 2**20)
    monkeypatch.setattr(Elsewhere, "packed", 0)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 500, (LENGTH,), generator=generator).tolist() for _ in range(8)]
    train = [Row(each, [IGNORE] * (LENGTH - 8) + each[-8:]) for each in ids]
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=2048,
        max_position_embeddings=LENGTH,
    )

    def run(lean: Lean, cap: float = float("inf"), **kwargs) -> tuple[Memory, GuardedTrainer]:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        model = tuned(Base("tiny", base, None))
        made = trainer(model, tmp_path, steps=2, train_dataset=train, lean=lean, keep_teacher=False, **kwargs)
        made.args.save_strategy = "no"
        made.rehearsal, made._accumulation, made.args.gradient_accumulation_steps = 0.0, 1, 1
        with Memory(cap) as memory:
            made.train()
        return memory, made

    return run


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`:UserWarning")
def test_each_rung_takes_less_memory_and_a_run_finds_the_one_that_fits(in_memory):
    """Against an allocator with a limit: between the peaks of two rungs the run has to come down to the leaner one.

    So nothing of what failed may live on.
    """
    rungs = [
        Lean(2**20),
        Lean(2**18),
        Lean(2**18, LENGTH * 2),
        Lean(2**18, LENGTH),
        Lean(2**18, LENGTH, True),
        Lean(2**18, LENGTH, True, True),
        Lean(2**18, LENGTH, True, True, LENGTH * 3 // 4),
    ]
    peaks, found = [], []
    for lean in rungs:
        memory, run = in_memory(lean)
        peaks.append(memory.peak)
        found.append(losses(run))
    assert peaks == sorted(peaks, reverse=True)
    assert Elsewhere.packed == 2 * 4 * LAYERS * HIDDEN * 4 * (LENGTH + LENGTH * 3 // 4)  # a state a layer
    for at in (1, 3, 5, 6):
        memory, run = in_memory(Lean(2**20), (peaks[at] + peaks[at - 1]) / 2, shorten=True)
        assert replace(run.lean, done=[]) == rungs[at]
        torch.testing.assert_close(losses(run), found[at], rtol=1e-4, atol=1e-6)
        assert run.state.global_step == 2


class Crowded:
    """More than `most` rows at once do not fit into generation, nor into a forward without a gradient."""

    def __init__(self, monkeypatch, most: int) -> None:
        self.most, self.sizes = most, []
        for owner, name in ((GenerationMixin, "generate"), (LlamaModel, "forward")):
            monkeypatch.setattr(owner, name, self.look(getattr(owner, name)))

    def look(self, real: Callable) -> Callable:
        @functools.wraps(real)
        def looked(module, *args, **inputs):
            ids = inputs.get("input_ids")
            if ids is not None and not torch.is_grad_enabled():
                self.sizes.append(len(ids))
                if len(ids) > self.most:
                    out_of_memory()
            return real(module, *args, **inputs)

        return looked


def test_questions_go_on_in_smaller_batches_with_the_same_answers(demo, renderer, monkeypatch):
    """And what is asked later in the process is asked in batches as small: before and after alike."""
    probes = load_probes(["world"])[:50]
    probes[7] = replace(probes[7], choices=(*probes[7].answers, *"abcdefghij"))
    whole = ask(demo.model, renderer, probes)
    told = []
    at_once.tell = lambda what, cache: told.append(what)
    crowd = Crowded(monkeypatch, 8)
    seen = []
    assert ask(demo.model, renderer, probes, progress=lambda *at: seen.append(at)) == whole
    assert len(told) == 3 and told[0].startswith("in batches of half the rows, 24 of")
    assert seen[0] == (0, 50) and seen[-1] == (50, 50)
    crowd.sizes.clear()
    assert ask(demo.model, renderer, probes) == whole
    assert max(crowd.sizes) <= 8 and len(told) == 3


def test_as_many_rehearsal_rows_are_written_in_smaller_batches_and_drift_is_the_same(monkeypatch):
    """Most of them are the very same: only a code that is worn out goes on by the batch's own random numbers."""
    base = load_base("demo", quant="none")
    renderer = Renderer(base.tokenizer)
    whole = rehearse(base.model, renderer, 40, seed=0, max_new_tokens=12)
    model = tuned(base)
    kl = drift(model, whole, Collator(0))
    Crowded(monkeypatch, 9)
    with model.disable_adapter():
        small = rehearse(model, renderer, 40, seed=0, max_new_tokens=12)
    assert len(small) == len(whole) == 40
    assert len({tuple(row.ids) for row in small} & {tuple(row.ids) for row in whole}) > 24
    monkeypatch.setattr(at_once, "cache", 2**30)
    assert drift(model, whole, Collator(0)) == pytest.approx(kl, rel=1e-4)
    assert at_once.cache < 2**30


def test_a_single_row_that_does_not_fit_says_what_to_do(demo, renderer, monkeypatch):
    Crowded(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match="a single row of") as error:
        ask(demo.model, renderer, load_probes(["world"])[:3])
    assert "kdguard presets" in error.value.hint


def test_other_errors_are_not_taken_for_a_lack_of_memory(demo):
    def broken(batch: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(in_batches(demo.model, [1, 2], lambda _: 1, broken))
    said = ["CUDA out of memory. Tried", "CUDA error: out of memory\n", "DefaultCPUAllocator: can't allocate memory"]
    assert all(ran_out(RuntimeError(each)) for each in said) and ran_out(MemoryError())
    assert not ran_out(ValueError("out of memory"))


def test_what_an_error_held_is_free_again():
    """The frames that it went through hold their tensors as long as it is there."""

    def work() -> None:
        tensor = torch.ones(10)
        gone.append(weakref.ref(tensor))
        out_of_memory()

    gone = []
    try:
        work()
    except torch.OutOfMemoryError as error:
        assert gone[0]() is not None
        forget(error)
        assert gone[0]() is None


def test_a_base_that_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **how: out_of_memory())
    with pytest.raises(OutOfMemory, match="demo: memory ran out while the base was loaded"):
        load_base("demo")


class OnceAPhase:
    """Memory runs out in the first forward or backward of every phase, and says so to the listener of the events."""

    def __init__(self, monkeypatch) -> None:
        self.phase, self.hit = "", []
        for owner, name in ((GenerationMixin, "generate"), (LlamaModel, "forward")):
            monkeypatch.setattr(owner, name, self.look(getattr(owner, name)))

    def __call__(self, event: dict) -> None:
        if event["event"] == "phase":
            self.phase = event["name"]
            at_once.cache = 2**30  # halved in every phase, few questions would soon be asked one by one
        elif event["event"] == "loss":
            self.phase = f"train, step {event['step']}"

    def look(self, real: Callable) -> Callable:
        @functools.wraps(real)
        def looked(*args, **inputs):
            if self.phase not in ("load", "train", *self.hit):
                self.hit.append(self.phase)
                out_of_memory()
            return real(*args, **inputs)

        return looked


def test_a_whole_run_in_which_memory_runs_out_in_every_phase(tmp_path, monkeypatch):
    """It ends with the same number of steps, the same answers before, and the same losses up to the first fault."""
    # A code that is worn out would go on by the batch's own random numbers, and write another rehearsal row.
    monkeypatch.setattr(torch, "rand_like", lambda codes: torch.full_like(codes, 0.37))
    data, probes = tmp_path / "facts.jsonl", tmp_path / "probes.jsonl"
    data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:16]))
    probes.write_text("".join((PACKS / "world.jsonl").read_text().splitlines(keepends=True)[::40]))
    config = TuneConfig(data=data, model="demo", epochs=2, batch_size=8, probes=[str(probes)], prompts=2)
    config = config.model_copy(update={"quant": "none", "rehearsal": 0.5})
    reports, faults, out = {}, None, screen()
    for name in ("whole", "disturbed"):
        if name == "disturbed":
            faults = OnceAPhase(monkeypatch)
        listeners = [Terminal(out), *([faults] if faults else [])]
        reports[name] = tune(config.model_copy(update={"out": tmp_path / name}), Events(*listeners))
    assert {"ask probes before", "ask new before", "grade", "rehearse", "report"} < set(faults.hit)
    assert {"ask probes after", "ask new after", "train, step 2", "train, step 4"} < set(faults.hit)
    assert reports["whole"]["cost"]["leaner"] == []
    assert len(reports["disturbed"]["cost"]["leaner"]) == len(faults.hit)
    assert reports["disturbed"]["cost"]["steps"] == reports["whole"]["cost"]["steps"] == 4
    events = {name: read_events(tmp_path / name / "events.jsonl") for name in reports}
    rehearsed = [(tmp_path / name / "checkpoints" / "rehearsal.jsonl").read_text() for name in reports]
    assert rehearsed[0] == rehearsed[1]
    told = {
        name: [(event["ce"], event["kl"]) for event in found if event["event"] == "loss"]
        for name, found in events.items()
    }
    assert told["disturbed"][0] == told["whole"][0]
    torch.testing.assert_close(told["disturbed"], told["whole"], rtol=1e-3, atol=1e-4)
    for folder, when in (("probes", "before"), ("new", "before"), ("probes", "after"), ("new", "after")):
        answers = [
            [row["answer"] for row in map(json.loads, (tmp_path / name / folder / f"{when}.jsonl").open())]
            for name in reports
        ]
        assert answers[0] == answers[1]
    leaner = [event for event in events["disturbed"] if event["event"] == "leaner"]
    assert progress(events["disturbed"]).leaner == [event["what"] for event in leaner]
    assert [event["phase"] for event in leaner] == [hit.split(",")[0] for hit in faults.hit]
    assert "larger ones" not in leaner[0]["what"] and "larger ones" in leaner[-1]["what"]
    shown = " ".join(out.file.getvalue().split())
    assert "memory ran out in step 2: " in shown and "memory ran out while asking the base old questions: " in shown
    assert "Memory ran out on the way" in (tmp_path / "disturbed" / "report.html").read_text()


def test_the_command_that_is_printed_goes_on_with_shorter_rows(tmp_path, monkeypatch, capsys):
    """A run that has come to the foot of the ladder says what to type; typed, it ends with all its steps."""
    data, probes = tmp_path / "facts.jsonl", tmp_path / "probes.jsonl"
    facts = DATA.read_text().splitlines(keepends=True)[:15]
    data.write_text("".join(facts) + json.dumps({"question": "Say yes. " * 20, "answer": "yes"}) + "\n")
    probes.write_text("".join((PACKS / "world.jsonl").read_text().splitlines(keepends=True)[:20]))
    flags = ["--model", "demo", "--epochs", "1", "--batch-size", "8", "--prompts", "1", "--rehearsal", "0"]
    kept = GuardedTrainer.__init__

    def crowded(self, *args, **kwargs):
        kept(self, *args, **kwargs)
        over(60)(monkeypatch, self)

    monkeypatch.setattr(GuardedTrainer, "__init__", crowded)
    monkeypatch.setattr(sys, "argv", ["kdguard", "tune", str(data), *flags, "--probes", str(probes), "--out", "run"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1 and "with a single row of" in said
    command = re.search(r"try (kdguard tune --resume --shorten --out run),", said)[1]
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["cost"]["steps"] == 2 and report["cost"]["leaner"][-1].startswith("rows cut to their last")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["shorten"] is True
