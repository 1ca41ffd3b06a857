"""`GuardedTrainer`: a `transformers.Trainer` whose loss holds the tuned model to its base."""

import copy
import hashlib
import itertools
import math
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from kdguard.data.rows import Rows
from kdguard.errors import InputError
from kdguard.guard.finite import refuse_no_targets, stop_not_finite
from kdguard.guard.kept import STATES, KeptStates
from kdguard.guard.lean_trainer import LeanTrainer
from kdguard.guard.lower import lower_layers
from kdguard.guard.moves import AdapterMoves
from kdguard.guard.teacher import Guard, count, install
from kdguard.model.head import check_head


class MixedBatchSampler(Sampler[list[int]]):
    """Micro-batches of training rows with their share of rehearsal rows, which follow them in one index space.

    Training rows are shuffled anew each epoch. Rehearsal rows are walked through in order, on from where the last
    epoch ended, so that none comes twice before all came once. Within an optimiser step rows are sorted by length
    before they are split into micro-batches: the step's gradient is the same, and there is less padding.

    train, rehearsal: the lengths of the rows, in tokens. batch_size: training rows per micro-batch. accumulation:
    micro-batches per optimiser step and process. ratio: rehearsal rows per training row. Each of `processes` takes
    every so many-th micro-batch, from its `rank` on, and all take equally many.

    packing: the largest micro-batch, in tokens, for rows that are packed and not padded. The rows of each step stay
    those of `batch_size` and `accumulation`, but are split by tokens, and `accumulation` becomes the smallest that
    keeps to it in the first LOOKED_AT steps of `epochs`. The longest row fits whatever it is.
    """

    LOOKED_AT = 1000

    def __init__(
        self,
        train: Sequence[int],
        rehearsal: Sequence[int],
        *,
        batch_size: int,
        accumulation: int = 1,
        ratio: float = 0.0,
        seed: int = 0,
        processes: int = 1,
        rank: int = 0,
        packing: int | None = None,
        epochs: int = 1,
    ) -> None:
        self.rows, self.extra, self.lengths = len(train), len(rehearsal), [*train, *rehearsal]
        self.step = batch_size * accumulation * processes  # training rows
        self.rows_at_once, self.accumulation = batch_size, accumulation
        self.ratio, self.seed = ratio, seed
        self.processes, self.rank = processes, rank
        self.epoch = 0
        self.packing = packing
        if packing:
            every = (step for epoch in range(epochs) for step in self._steps(epoch))
            steps = list(itertools.islice(every, self.LOOKED_AT))
            largest, most = max(packing, *self.lengths), int(self.step * (1 + ratio)) // processes
            self.accumulation = 1
            while self.accumulation < most and any(
                sum(self.lengths[row] for row in pack) > largest for step in steps for pack in self._split(step)
            ):
                self.accumulation += 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        steps, rest = divmod(self.rows, self.step)
        return steps * self.accumulation + (self._micro_batches(rest) if rest else 0)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps(self.epoch):
            yield from self._split(step)[self.rank :: self.processes]

    def _steps(self, epoch: int) -> Iterator[list[int]]:
        """The rows of each optimiser step, the shortest first."""
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        for start in range(0, self.rows, self.step):
            rows = order[start : start + self.step].tolist()
            before = epoch * self.rows + start
            first, last = (round(seen * self.ratio) for seen in (before, before + len(rows)))
            rows += [self.rows + i % self.extra for i in range(first, last)]
            yield sorted(rows, key=self.lengths.__getitem__)

    def _micro_batches(self, trained: int) -> int:
        """Of a step with so many training rows, per process."""
        if self.packing:
            return min(self.accumulation, max(1, int(trained * (1 + self.ratio)) // self.processes))
        return -(-trained // (self.rows_at_once * self.processes))

    def _split(self, rows: list[int]) -> list[list[int]]:
        """The micro-batches of a step, of all processes."""
        micro_batches = self._micro_batches(sum(row < self.rows for row in rows)) * self.processes
        # The last step of many processes: none goes empty, and each row counts as much as any other.
        rows = rows * -(-micro_batches // len(rows))
        if not self.packing:
            cuts = [len(rows) * i // micro_batches for i in range(micro_batches + 1)]
            return [rows[i:j] for i, j in itertools.pairwise(cuts)]
        packs: list[list[int]] = [[] for _ in range(micro_batches)]
        tokens = [0] * micro_batches
        for row in reversed(rows):  # the longest first, each into the emptiest
            emptiest = tokens.index(min(tokens))
            packs[emptiest].append(row)
            tokens[emptiest] += self.lengths[row]
        return packs


class GuardedTrainer(LeanTrainer):
    """Trains a PEFT model on rows with `input_ids`, `attention_mask` and `labels`, guarded by its own base.

    It takes what `transformers.Trainer` takes; beside `loss` it logs `ce`, in nats per target token, and `kl`, in nats
    per guarded token. With TRL's rows and collator: `class GuardedSFTTrainer(GuardedTrainer, SFTTrainer)`. And it takes

    guard: weight, temperature and masking of the KL; `Guard(weight=0)` is plain SFT on the same code path.
    rehearsal_dataset: rows without targets, written by the base (`kdguard.rehearse`); they are guarded only.
    rehearsal: rehearsal rows per training row.
    keep_teacher: keep the teacher's final hidden states of rows that come more than once in a file of `output_dir`,
        and run the teacher only on their first visit; False runs it live on every step. Layers below the lowest
        adapter (`layers_to_transform` of a LoraConfig) run with the teacher and serve both.
    packing: tokens in memory at once, for a collator that packs rows (`kdguard.data.batches.pack`, or transformers'
        DataCollatorWithFlattening). An optimiser step has as many rows as `args` say, but goes through the model in as
        few micro-batches as that allows: `gradient_accumulation_steps` follows. The model must keep packed rows apart
        (`kdguard.model.packing`).
    lean: with how little memory to begin (`kdguard.guard.lean`). Where it runs out, the optimiser step is begun anew
        with less: its rows and its gradient stay what they were. One of several processes cannot do so by itself.
    shorten: whether the longest rows may be cut, once nothing else is left.
    on_step_down: called with what was done, in words, and `step`, its number.

    Raises InputError for a model whose head is trained and a step without targets; KdguardError when training goes
    wrong silently, with an adapter that does not move, or, before it touches a weight and after a checkpoint of the
    last whole step, a loss or gradient that is not finite; OutOfMemory, after such a checkpoint too, when nothing that
    takes less memory is left.
    """

    def __init__(
        self,
        *args: Any,
        guard: Guard | None = None,
        rehearsal_dataset: Sequence[Any] | None = None,
        rehearsal: float = 0.0,
        keep_teacher: bool = True,
        packing: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, PeftModel):
            raise InputError(
                "GuardedTrainer needs a PEFT model: its base, adapters off, is the teacher", "get_peft_model(...)"
            )
        _refuse_trained_head(self.model)
        check_head(self.model.get_base_model())
        self.guard = guard or Guard()
        self.rehearsal_dataset = rehearsal_dataset
        self.rehearsal = rehearsal if rehearsal_dataset else 0.0
        # Where weights are sharded a forward is collective: no process may leave one out, nor a layer.
        lower = None if self._sharded else lower_layers(self.model.get_base_model())
        keep = keep_teacher and self.guard.weight > 0 and not self._sharded
        self.kept = self._kept_states(lower.n if lower else 0) if keep else None
        install(self.model, self.guard, self.kept, lower, lean=self.lean)
        # One process, one GPU: nn.DataParallel would double the batch, and no base is split like that.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        self._train_batch_size = self.args.train_batch_size
        self.packing = packing
        self._accumulation = self.args.gradient_accumulation_steps
        if packing:
            if self.is_deepspeed_enabled:
                raise InputError("DeepSpeed has already read how many micro-batches a step has", "packing=None")
            self.args = copy.copy(self.args)  # another trainer may be made from the caller's
            self.args.gradient_accumulation_steps = self._sampler().accumulation
        self.args.logging_nan_inf_filter = False  # it would replace a NaN in the log and train on
        self.loss_is_scaled_for_ga = True  # the counts are of the whole step
        self.add_callback(AdapterMoves(self.accelerator))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        finished = stopped = False
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            finished = self.state.global_step >= self.state.max_steps
            return result
        except KeyboardInterrupt:
            stopped = True  # a checkpoint of the last step is still to come, and tells which states there are
            raise
        finally:
            if self.kept and not stopped:
                self.kept.close(finished=finished)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A teacher's adapter would be taken for the only one when this checkpoint is loaded.
        if self.guard.teacher:
            shutil.rmtree(Path(output_dir or self.args.output_dir) / self.guard.teacher, ignore_errors=True)

    def _kept_states(self, lower: int) -> KeptStates | None:
        """A place for the states of the rows that are visited more than once, if there are any."""
        if self.args.num_train_epochs <= 1:
            return None
        rows, extra = self.train_dataset, self.rehearsal_dataset or []
        kept = [rows, extra] if len(extra) < len(rows) * self.args.num_train_epochs * self.rehearsal else [rows]
        of = hashlib.sha256(repr((self.model.get_base_model().name_or_path, self.guard.teacher, lower)).encode())
        for row in itertools.chain(*kept):
            of.update(array("l", _ids(row)).tobytes())
        path = Path(self.args.output_dir) / STATES.replace("*", str(self.args.process_index))
        room = self.room_for_checkpoints((self.args.save_total_limit or 0) + 2)
        return KeptStates(path, [*itertools.chain(*map(_lengths, kept))], of.hexdigest(), room)

    def _sampler(self) -> MixedBatchSampler:
        return MixedBatchSampler(
            _lengths(self.train_dataset),
            _lengths(self.rehearsal_dataset or []),
            batch_size=self._train_batch_size,
            accumulation=self._accumulation,
            ratio=self.rehearsal,
            seed=self.args.seed,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            packing=self.packing,
            epochs=math.ceil(self.args.num_train_epochs),
        )

    def get_train_dataloader(self) -> DataLoader:
        extra = self.rehearsal_dataset or []
        dataset = ConcatDataset([self.train_dataset, extra]) if extra else self.train_dataset
        return _Loader(
            _Numbered(dataset),
            batch_sampler=self._sampler(),
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def _collate(self, numbered: Sequence[tuple[int, Any]]) -> dict[str, torch.Tensor]:
        collate = self._get_collator_with_removed_columns(self.data_collator)
        batch = collate([row for _, row in numbered])
        return {**batch, "row_ids": torch.tensor([number for number, _ in numbered])}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The guarded loss of one micro-batch; its share of the step's means, so that micro-batches add up."""
        counts = count(inputs) if num_items_in_batch is None else num_items_in_batch
        outputs = model(**inputs, counts=(counts[0], counts[1]))
        if model.training:
            parts = torch.stack([outputs["ce"], outputs["kl"]]).detach().double().cpu()
            if not parts.isfinite().all():
                stop_not_finite(self, "the loss")
            self._parts += parts
        # DDP and FSDP average gradients over processes; the counts already divide by all of them.
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any) -> tuple[list, torch.Tensor]:
        micro_batches, counts = super().get_batch_samples(*args)
        if not counts[0]:
            refuse_no_targets(self)
        return micro_batches, counts

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 an infinite gradient only lowers the loss scale, and the step is skipped.
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            stop_not_finite(self, "the gradient")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            parts = self.accelerator.gather(self._parts[None].to(self.args.device, torch.float32)).sum(0)
            logs["ce"], logs["kl"] = (parts / max(1, self._steps)).tolist()
            self._parts.zero_()
            self._steps = 0
        super().log(logs, start_time)


class _Numbered(Dataset):
    """Rows with their number, by which their teacher states are kept."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.rows[number]


class _Loader(DataLoader):
    """A loader whose sampler already gives each process its own rows: accelerate must not share them out again."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def _lengths(rows: Any) -> Sequence[int]:
    """Tokens of each row; a dataset that knows them need not read its rows."""
    return rows.lengths.tolist() if isinstance(rows, Rows) else [len(_ids(row)) for row in rows]


def _ids(row: Any) -> Sequence[int]:
    return row["input_ids"] if isinstance(row, Mapping) else row.ids


def _refuse_trained_head(model: PeftModel) -> None:
    if any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        raise InputError(
            "the output head of this model is trained (modules_to_save, or LoRA on the head)",
            "teacher and student must share a frozen head: leave lm_head and the embeddings out of the LoRA config",
        )
