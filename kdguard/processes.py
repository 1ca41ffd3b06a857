"""Several processes of one run, as `accelerate launch` and torchrun start them: all compute, the main one speaks.

Nothing here makes a process: the launcher does, and accelerate's `PartialState` connects them.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

TIMEOUT = timedelta(hours=12)  # of one waiting for another: the main one may have to read large data first


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes the run folder, prints, and has the run's lock."""
    return int(os.environ.get("RANK", "0")) == 0


def sharded() -> bool:
    """Whether the launcher was told to spread weights over the processes, by FSDP or DeepSpeed."""
    return any(os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" for engine in ("FSDP", "DEEPSPEED"))


def join() -> None:
    """Connect the processes, each with a GPU of its own where there is one, before anything is loaded."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)


def leave() -> None:
    """Let go of the others, once all is done."""
    if count() > 1:
        from accelerate import PartialState

        state = PartialState()
        state.wait_for_everyone()
        if state.device.type == "cuda":  # NCCL wants it; gloo, on a CPU, at times aborts the process
            state.destroy_process_group()


def by_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on all of them; an error that it raises there is raised on all."""
    if count() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    said: list[Any] = [None, None]
    if is_main():
        try:
            said[0] = work()
        except Exception as error:
            said[1] = error
    broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    found: T = said[0]
    return found


def agreed(value: T) -> T:
    """The main process's `value`, where each has one of its own that may differ by rounding."""
    return by_main(lambda: value)


def main_first(work: Callable[[], T]) -> T:
    """`work` on the main process, and then on the others, which find what it has kept for them."""
    found: list[T] = []
    by_main(lambda: found.append(work()))
    return found[0] if found else work()


def gathered(value: T) -> list[T]:
    """The `value` of each process, in their order."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def first_to_fail() -> bool:
    """Whether this process is to tell what went wrong: the first that asks. What the others meet comes of that."""
    if count() == 1:
        return True
    from torch import distributed

    if not distributed.is_initialized():
        return is_main()  # what was typed is wrong for all
    try:
        return bool(distributed.distributed_c10d._get_default_store().add("failed", 1) == 1)
    except RuntimeError:  # it was the main one's, and is gone
        return False
