"""Counts the memory that tensors take, op by op: how much is alive at the worst moment of each phase, and for what."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """While it is on, every tensor that is made counts, in bytes, under the label of that moment until it is freed.

    Within a `torch.profiler.record_function` range the label is the range's name. peaks: for each label the bytes by
    label at the moment when they were most while it was the current one. On fake tensors a boolean mask is taken to
    choose everything, and a question for a value is answered with 1, or yes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._known: set[int] = set()
        self._outer: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        if name == "profiler::_record_function_enter_new":
            self._outer.append(self.label)
            self.label = args[0]
        elif name == "profiler::_record_function_exit":
            self.label = self._outer.pop()
        fake = isinstance(args[0] if args else None, FakeTensor)
        masked = fake and name in ("aten::index", "aten::index_put_") and any(_is_mask(at) for at in args[1])
        if masked:
            made = _everything(*args[:2]) if name == "aten::index" else args[0]
        elif fake and name == "aten::_local_scalar_dense":
            made = 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        else:
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        # Its fake leaves out the weight that it unpacks.
        self._note(_unpacked(args) if name == "bitsandbytes::gemm_4bit" else 0)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        label, size = self.label, storage.nbytes()
        self.live[label] += size
        weakref.finalize(storage, self._freed, storage._cdata, label, size)

    def _freed(self, storage: int, label: str, size: int) -> None:
        self._known.discard(storage)
        self.live[label] -= size

    def _note(self, passing: int) -> None:
        now = self.live.total() + passing
        if now > self.peaks.get(self.label, Counter()).total():
            self.peaks[self.label] = self.live + Counter({self.label: passing})


def _is_mask(at: Any) -> bool:
    return isinstance(at, Tensor) and at.dtype == torch.bool


def _everything(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    (mask,) = indices
    return tensor.new_empty(mask.numel(), *tensor.shape[mask.dim() :])


def _unpacked(args: tuple) -> int:
    inputs, _, shape = args[:3]
    return shape[0] * shape[1] * inputs.element_size()
