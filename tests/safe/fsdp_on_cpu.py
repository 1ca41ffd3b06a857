"""kdguard with accelerate told that its processes on a CPU are GPUs: else it leaves FSDP out there."""

from accelerate.state import DistributedType, PartialState

from kdguard.__main__ import main

begin = PartialState.__init__


def begin_as_gpu(self: PartialState, *args: object, **kwargs: object) -> None:
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = begin_as_gpu
main()
