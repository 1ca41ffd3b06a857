"""When memory runs out: how that is told from other errors, and batches that go on with half the rows."""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from kdguard.errors import OutOfMemory
from kdguard.events import read_events

Item = TypeVar("Item")
Result = TypeVar("Result")

_SAID = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # by the driver and by cuBLAS


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = isinstance(error, RuntimeError) and any(each in str(error) for each in _SAID)
    return said or should_reduce_batch_size(error)


def forget(error: BaseException) -> None:
    """Free what the frames that `error` went through still hold, and what the allocator keeps for later."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__context__
    clear_device_cache(garbage_collection=True)


@dataclass
class AtOnce:
    """How many rows go through a model at once where nothing is trained.

    There is one for the whole process, and it never grows: in 16 bits the shape of a batch can change an answer, and
    what is asked before training is asked again after it.

    cache: bytes of the rows' keys and values. tell: called with what was done when memory ran out, in words, and the
    `cache` from then on.
    """

    cache: int = 2**29
    tell: Callable[..., None] = lambda what, cache: None

    def as_in(self, events: Path) -> None:
        """As few rows at once as the run with these `events` has come to."""
        self.cache = min([self.cache, *(event["cache"] for event in read_events(events) if "cache" in event)])


at_once = AtOnce()


def batch_rows(model: PreTrainedModel, tokens: int) -> int:
    """Rows of `tokens` to go through the model at once: as many as keep their cache within `at_once`, 512 at most."""
    return max(1, min(512, at_once.cache // _row_bytes(model, tokens)))


def in_batches(
    model: PreTrainedModel,
    items: Sequence[Item],
    tokens: Callable[[Item], int],
    work: Callable[[list[Item]], Result],
    *,
    most: int = 512,
) -> Iterator[Result]:
    """What `work` makes of the items, a batch at a time, in their order; at most `most` in one.

    A batch in which memory runs out is begun anew with half its rows, and so small are all others in this process from
    then on. tokens: how many an item needs room for, those to be written included.

    Raises OutOfMemory when a row by itself does not fit.
    """
    done = 0
    while done < len(items):
        rows, longest = 1, tokens(items[done])
        for item in items[done + 1 : done + most]:
            wider = max(longest, tokens(item))
            if rows >= batch_rows(model, wider):
                break
            rows, longest = rows + 1, wider
        try:
            found = work(list(items[done : done + rows]))
        except Exception as error:
            if not ran_out(error):
                raise
            forget(error)
            if rows == 1:
                raise OutOfMemory(
                    f"memory ran out with a single row of {longest:,} tokens",
                    "close what else uses the GPU, or take a smaller model: kdguard presets",
                ) from None
            at_once.cache = rows // 2 * _row_bytes(model, longest)
            at_once.tell(f"in batches of half the rows, {rows // 2:,} of {longest:,} tokens", cache=at_once.cache)
            continue
        done += rows
        yield found


def _row_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Of a row's keys and values."""
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return tokens * 2 * text.num_hidden_layers * heads * head * model.dtype.itemsize


def peak_memory_gib() -> float:
    """The GPU's peak allocation, or this process's peak resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
