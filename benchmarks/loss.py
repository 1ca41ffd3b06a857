"""How fast and how lean the guarded loss is beside its peers: same inputs, same gradients, time and peak memory.

`pip install -c constraints.txt -e .[bench]` brings the peers; `python benchmarks/loss.py` prints a table and writes
`benchmarks/results/loss-cpu.json` or `loss-cuda.json`. Every position is a target and nothing is masked, for only that
do all of them compute: cross-entropy plus weight times the forward KL to the teacher, means over the positions. The
heads and states are bf16, the type in which those models are published.

Times are medians of interleaved rounds. Peak memory is what one forward and backward adds, measured in a process of
its own, for `--tokens` positions and for twice as many.
"""

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from report import write
from torch import Tensor

from kdguard.guard.loss import guard_loss
from kdguard.model.head import Head

WEIGHT = 6.0
HEADS = {  # (vocabulary, hidden)
    "Llama 3.1 8B": (128_256, 4096),
    "Qwen 2.5 7B": (152_064, 3584),
    "Gemma 2 9B": (256_000, 3584),
}


def ours(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return guard_loss(student, teacher, labels, Head(weight), weight=WEIGHT, masked=False).loss


def unchunked(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits, wanted = (student @ weight.T).float(), (teacher @ weight.T).float()
    divergence = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, labels) + WEIGHT * divergence


def trl_and_torch(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, 0.0)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(student, weight, labels, options=options) + WEIGHT * divergence.mean()


def liger(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    compiled = student.is_cuda
    return LigerFusedLinearJSDFunction.apply(
        student, weight, teacher, weight, labels, None, None, 1.0, WEIGHT, 0.0, -100, 1.0, compiled
    )


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "kdguard": ours,
    "unchunked PyTorch": unchunked,
    "TRL divergence + torch linear_cross_entropy": trl_and_torch,
    "Liger distillation": liger,
}


def inputs(head: str, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """student and teacher (tokens, hidden), the head's weight (vocabulary, hidden), labels (tokens,)."""
    vocabulary, hidden = HEADS[head]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weight = torch.empty(vocabulary, hidden, device=device, dtype=torch.bfloat16).normal_(std=hidden**-0.5)
    teacher = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    student = (teacher + 0.3 * torch.randn_like(teacher)).requires_grad_()
    return student, teacher, weight, torch.randint(vocabulary, (tokens,), device=device)


def step(name: str, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, Tensor]:
    """Seconds of one forward and backward, and the gradient of the student's hidden states."""
    given[0].grad = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    LOSSES[name](*given).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, given[0].grad


def peak_mib(name: str, head: str, tokens: int) -> float:
    """What one step adds to the memory that its inputs take."""
    given = inputs(head, tokens)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, given)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    tiny = (
        torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(2, 8, dtype=torch.bfloat16),
        torch.randn(16, 8, dtype=torch.bfloat16),
        torch.zeros(2, dtype=torch.long),
    )
    step(name, tiny)  # libraries loaded, no more
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is held now
    before = _peak_kib()
    step(name, given)
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def alone(function: Callable, *args):
    """Call it in a fresh process, so that its peak is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096 if torch.cuda.is_available() else 512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    args = parser.parse_args()
    results = []
    for head in args.heads:
        given = inputs(head, args.tokens)
        times: dict[str, list[float]] = {name: [] for name in LOSSES}
        wanted = step("unchunked PyTorch", given)[1].clone()
        error = {}
        for _ in range(args.rounds):
            for name in LOSSES:
                seconds, grad = step(name, given)
                times[name].append(seconds)
                error[name] = ((grad - wanted).norm() / wanted.norm()).item()
        del given
        mine = statistics.median(times["kdguard"])
        for name in LOSSES:
            seconds = statistics.median(times[name])
            memory = [alone(peak_mib, name, head, n) for n in (args.tokens, 2 * args.tokens)]
            results.append(
                {
                    "head": head,
                    "loss": name,
                    "tokens": args.tokens,
                    "seconds": seconds,
                    "kdguard_over_it": mine / seconds,
                    "gradient_error": error[name],
                    "peak_mib": memory[0],
                    "peak_mib_at_twice_the_tokens": memory[1],
                }
            )
            print(
                f"{head:13} {name:44} {seconds:7.3f} s  kdguard takes {mine / seconds:4.2f} of it  "
                f"gradient off by {error[name]:.0e}  peak {memory[0]:6.0f} MiB, {memory[1]:6.0f} for twice the tokens",
                flush=True,
            )
        write(f"loss-{'cuda' if torch.cuda.is_available() else 'cpu'}", results)


if __name__ == "__main__":
    main()
