"""What a GPU's memory and time say of kdguard: peak memory and tokens a second of 7B and 8B models, and of its peers.

    python benchmarks/gpu.py                    on a GPU: at most 450 seconds; writes benchmarks/results/gpu-<GPU>.json
    python benchmarks/gpu.py --resume --budget 900       the rows that the file has not measured yet
    python benchmarks/gpu.py --tiny --out FILE  the same rows in small, on any CPU: whether it runs, no figures of a GPU

No weights are needed and nothing is fetched: Qwen 2.5 7B, Llama 3.1 8B and Mistral 7B with random weights, in NF4, in
the shapes that the presets have. The machine needs torch >= 2.10, transformers 5, peft, accelerate and bitsandbytes;
kdguard itself is taken from this checkout, and what it needs beside is done without (`bare.py`). Where bitsandbytes is
not installed, the folder `bitsandbytes` out of its wheel is enough, and of its libraries the one for torch's CUDA:

    PYTHONPATH=/folder/that/has/it python benchmarks/gpu.py

Each row is measured by a process of its own, so that a crash or a lack of memory costs that row; the most important
ones come first, and the file is written after each. A smaller card is stood in for by a cap on what torch's allocator
may take (`torch.cuda.set_per_process_memory_fraction`): a real one also holds the CUDA context, some hundred MiB.

A step is two rows, each a micro-batch of its own. Peaks are those of the allocator. `measured_over_estimate` divides
the peak, and what the optimiser has in unified memory, by what `kdguard fit` says of training. `less_memory_by` says
what training did when memory ran out; such a row has not fitted as it was asked for.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from datetime import date
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
BUDGET, LIMIT, START = 450.0, 90.0, 120.0  # seconds: of all, of a row, until the first process answers
LEAST = 15.0  # seconds that a row is begun with
LLAMA, QWEN, MISTRAL = "llama3.1-8b", "qwen2.5-7b", "mistral-7b"
LENGTHS, LONGER = (512, 1024, 2048, 4096), (8192, 16384)  # tokens; the longer ones for Llama alone
PUBLISHED = {  # longest rows, in tokens, of Llama 3.1 8B at rank 32, one at once, by the GB of a card; no teacher
    8.0: {"unsloth_published": 2972, "hf_fa2_published": None},
    12.0: {"unsloth_published": 21848, "hf_fa2_published": 932},
    16.0: {"unsloth_published": 40724, "hf_fa2_published": 2551},
    24.0: {"unsloth_published": 78475, "hf_fa2_published": 5789},
}
ESTIMATED = "guard off", "guard on", "upper half"  # beginnings of what `fit` knows
SPAWN = multiprocessing.get_context("spawn")

Row = dict[str, Any]


def row(group: str, model: str, what: str, length: int | None, *, rank: int = 64, cap: float | None = None) -> Row:
    return {"group": group, "model": model, "what": what, "length": length, "rank": rank, "cap_gib": cap}


def longest(cap: float, attempt: int, what: str = "guard on") -> Row:
    """A row of the longest length that `fit` predicts for a cap; a second attempt is a tenth longer, or shorter."""
    return {**row("longest", LLAMA, what, None, rank=32, cap=cap), "attempt": attempt, **PUBLISHED[cap]}


def plan(peer: str) -> list[Row]:
    """Every row, the most important ones first. peer: the trainer that stands for plain QLoRA."""
    ways = "guard off", "guard on", "guard on, kept states"
    return [
        *(row("caps", model, "guard on", 1024, rank=32, cap=8.0) for model in (QWEN, LLAMA, MISTRAL)),
        *(longest(cap, 1) for cap in PUBLISHED),
        *(row("lengths", LLAMA, what, length) for length in (1024, 2048) for what in ways),
        *(row("peers", LLAMA, what, length) for what in (peer, "naive teacher") for length in (1024, 2048)),
        *(longest(cap, 2) for cap in PUBLISHED),
        *(row("lengths", model, what, 1024) for model in (QWEN, MISTRAL) for what in ways),
        *(row("lengths", LLAMA, what, length) for length in (4096, *LONGER, 512) for what in ways),
        *(row("upper half", LLAMA, what, 1024) for what in ("upper half", "upper half, kept states")),
        *(longest(cap, 1, "guard on, offload") for cap in PUBLISHED if cap < 24),
        *(row("lengths", model, what, n) for n in (2048, 4096, 512) for model in (QWEN, MISTRAL) for what in ways),
        *(row("upper half", LLAMA, "upper half", length) for length in (2048, 4096, *LONGER, 512)),
        *(row("upper half", model, "upper half", length) for model in (QWEN, MISTRAL) for length in LENGTHS),
    ]


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is before it is measured: a length that is predicted is no part of it."""
    length = row["attempt"] if "attempt" in row else row["length"]
    return row["model"], row["what"], row["rank"], row["cap_gib"], length


def work(pipe: Connection, log: str, tiny: bool, with_gpu: bool) -> None:
    """A process that answers questions; see `gpu_row.serve`."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several GPUs, a Trainer would use all
    if not with_gpu:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    import gpu_row

    gpu_row.serve(pipe, tiny)


class Worker:
    """A process of its own; what it prints goes into a file."""

    def __init__(self, log: Path, tiny: bool, with_gpu: bool = True) -> None:
        self.log = log
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=work, args=(theirs, str(log), tiny, with_gpu), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended: `answer` says so
            self.pipe.send(message)

    def answer(self) -> Any:
        """What it says; call it once there is something to read."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            said = self.log.read_text(errors="replace").strip().splitlines()[-1:] if self.log.exists() else []
            return {
                "status": "failed",
                "reason": " ".join([f"the process ended with {self.process.exitcode}:", *said])[:300],
            }

    def end(self) -> None:
        """Let it end: it does when nobody listens."""
        self.pipe.close()

    def kill(self) -> None:
        self.end()
        self.process.kill()


class Run:
    """The measuring of all rows, with what `fit` says of them worked out beside it."""

    def __init__(self, rows: list[Row], out: Path | None, *, tiny: bool, budget: float, folder: Path) -> None:
        self.rows, self.out, self.tiny, self.folder = rows, out, tiny, folder
        self.deadline = time.monotonic() + budget
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
        self.about: Row = {}
        self.workers: list[Worker] = []
        self.idle: list[Worker] = []  # estimators
        self.busy: dict[Connection, tuple[Worker, str]] = {}
        self.questions: deque[tuple[str, tuple[Any, ...]]] = deque()
        self.known: dict[str, Any] = {}  # answers of estimators

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def worker(self, *, with_gpu: bool = True) -> Worker:
        made = Worker(self.folder / f"{len(self.workers)}.log", self.tiny, with_gpu)
        self.workers.append(made)
        return made

    def ask_about(self) -> str | None:
        """Ask what machine it is; what is wrong with it, if something is."""
        first = self.worker()
        first.send("about")
        if not first.pipe.poll(min(START, self.left)):
            return f"the libraries were not imported within {START:.0f} s"
        self.about = first.answer()
        first.end()
        return self.about.get("reason")

    def estimate(self, row: Row) -> None:
        """Have it worked out what `fit` says of a row, unless that is on its way."""
        key = self.key(row)
        if row["what"].startswith(ESTIMATED) and key not in self.known:
            self.known[key] = None
            self.questions.append((key, ("estimate", row, self.tiny)))

    @staticmethod
    def key(row: Row) -> str:
        kind = row["what"].removesuffix(", kept states")
        return json.dumps([row["model"], kind, row["rank"], row["length"]])

    def listen(self, until: Connection | None, seconds: float) -> bool:
        """Keep the estimators at work until there is an answer at `until`; False where none came within `seconds`."""
        end = time.monotonic() + seconds
        while True:
            while self.idle and self.questions:
                worker, (key, question) = self.idle.pop(), self.questions.popleft()
                worker.send(*question)
                self.busy[worker.pipe] = worker, key
            ready = wait([*self.busy, *([until] if until else [])], max(0.0, end - time.monotonic()))
            for pipe in [pipe for pipe in ready if pipe in self.busy]:
                worker, key = self.busy.pop(pipe)
                self.known[key] = worker.answer()
                if worker.process.is_alive():
                    self.idle.append(worker)
                else:
                    self.idle.append(self.worker(with_gpu=False))
            if until in ready:
                return True
            if time.monotonic() >= end or (until is None and not self.busy):
                return False

    def resolve(self, row: Row) -> bool:
        """Give a row the length that follows from the prediction; False while there is none yet."""
        if row["length"] is not None:
            return True
        predicted = self.known.get(f"longest, {row['what']}")
        if predicted is None:
            return False
        if isinstance(predicted, dict):
            row |= {"status": "failed", "reason": f"no prediction: {predicted['reason']}"}
            return True
        share = 1.0
        if row["attempt"] == 2:
            first = next(each for each in self.rows if identity(each) == (*identity(row)[:-1], 1))
            if "status" not in first:
                return False
            share = 1.1 if first["status"] == "ok" and not first["less_memory_by"] else 0.9
        row["predicted_longest"] = predicted[list(PUBLISHED).index(row["cap_gib"])]
        row |= {"of_longest": share, "length": round(row["predicted_longest"] * share)}
        if row["length"] < 16:
            row |= {"status": "skipped", "reason": "predicted to fit at no length"}
        return True

    def next(self, waiting: deque[Row]) -> Row | None:
        """The next row that can be measured; what cannot be is settled on the way."""
        held: list[Row] = []
        found = None
        while waiting and found is None:
            row = waiting.popleft()
            if row["cap_gib"] and not self.about["gpu"]:
                row |= {"status": "skipped", "reason": "no GPU"}
            elif "offload" in row["what"] and not self.about["can_offload"]:
                row |= {"status": "skipped", "reason": "transformers before 5.23 cannot offload checkpoints"}
            elif not self.resolve(row):
                held.append(row)
            elif "status" not in row:
                found = row
        waiting.extendleft(reversed(held))
        if found:
            self.estimate(found)
        return found

    def measure(self) -> None:
        cores = os.cpu_count() or 1
        ahead = cores >= 4 and not self.tiny  # the next process is imported while this one measures
        self.idle = [self.worker(with_gpu=False) for _ in range(max(1, min(4, cores // 4)))]
        waiting = deque(row for row in self.rows if "status" not in row)
        if self.about["gpu"]:
            for what in sorted({row["what"] for row in waiting if "attempt" in row}):
                key = f"longest, {what}"
                self.questions.append((key, ("longest", {"model": LLAMA, "what": what, "rank": 32}, list(PUBLISHED))))
        coming: tuple[Row, Worker] | None = None
        spare: Worker | None = None
        while True:
            if coming is None:
                row = self.next(waiting)
                if row is None and waiting and (self.busy or self.questions) and self.left > LEAST:
                    self.listen(None, 1.0)  # for a prediction
                    continue
                if row is None:
                    break
                coming = row, spare or self.worker()
                coming[1].send("measure", row)
                spare = None
            if self.left < LEAST:
                coming[1].kill()
                break
            row, worker = coming
            coming = None
            worker.send("go")
            if ahead and (after := self.next(waiting)):
                coming = after, self.worker()
                coming[1].send("measure", after)
            began = time.monotonic()
            limit = min(LIMIT, self.left)
            if self.listen(worker.pipe, limit):
                row |= worker.answer()
            else:
                row |= {"status": "failed", "reason": f"no result within {limit:.0f} s"}
                if limit < LIMIT:
                    row |= {"status": "not run", "reason": "no time left"}
                worker.kill()
            if self.tiny and row["status"] == "ok":
                spare = worker
            else:
                worker.end()
            row["took_seconds"] = round(time.monotonic() - began, 1)
            self.write()
            self.tell(row)
        while (self.busy or self.questions) and self.left > 0:
            self.listen(None, min(1.0, self.left))
        self.write()

    def write(self) -> None:
        """Complete what is known of each row, and put all of it into the file."""
        for row in self.rows:
            said = self.known.get(self.key(row))
            if said and "estimate_gib" in said:
                row |= said
            elif said:
                row["estimate_failed"] = said["reason"]
            if row.get("status") == "ok" and "estimate_gib" in row:
                measured = row["peak_allocated_gib"] + row["paged_gib"]
                row["measured_over_estimate"] = measured / row["estimate_gib"]
        if self.out:
            from kdguard.files import write_whole

            about = {key: value for key, value in self.about.items() if key != "gpu"}
            left = {"status": "not run", "reason": "no time left"}
            rows = [row if "status" in row else {**row, **left} for row in self.rows]
            made = {**about, "date": str(date.today()), "tiny": self.tiny, "results": rows}
            write_whole(self.out, json.dumps(made, indent=1) + "\n")

    def tell(self, row: Row) -> None:
        done = sum("status" in row for row in self.rows)
        said = [f"{row['model']}, {row['what']}", f"{row['length']} tokens"]
        if row["cap_gib"]:
            said.append(f"under {row['cap_gib']:g} GiB")
        if row["status"] == "ok":
            said.append(f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_allocated_gib']:.2f} GiB")
        else:
            said.append(f"{row['status']}: {row['reason']}")
        left = f"[{done}/{len(self.rows)}, {max(0, self.left):.0f} s left]"
        self.console.print(left, ", ".join(said), markup=False)

    def table(self) -> Table:
        names = "model|what|rank|tokens|cap|status|tokens/s|s a step|GiB|reserved|estimated|measured / estimated"
        table = Table(*names.split("|"), title=f"{self.about['machine']}{' (tiny)' if self.tiny else ''}")
        for row in self.rows:
            figures = [
                f"{row[key]:{form}}" if key in row else ""
                for key, form in {
                    "tokens_per_second": ",.0f",
                    "seconds_per_step": ".3f",
                    "peak_allocated_gib": ".2f" if not self.tiny else ".4f",
                    "peak_reserved_gib": ".2f" if not self.tiny else ".4f",
                    "estimate_gib": ".2f" if not self.tiny else ".4f",
                    "measured_over_estimate": ".3f",
                }.items()
            ]
            cap = f"{row['cap_gib']:g}" if row["cap_gib"] else ""
            status = "with less at once" if row.get("less_memory_by") else row.get("status", "not run")
            cells = [row["model"], row["what"], str(row["rank"]), f"{row['length'] or '?'}", cap, status, *figures]
            table.add_row(*cells)
        return table

    def end(self) -> None:
        for worker in self.workers:
            worker.end()
        end = time.monotonic() + 5
        for worker in self.workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            worker.process.kill()


def slug(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def kept(out: Path, rows: list[Row]) -> list[Row]:
    """The rows of a plan, with what `out` has measured of them before."""
    before = json.loads(out.read_text(encoding="utf-8"))["results"]
    done = {identity(row): row for row in before if row["status"] in ("ok", "out of memory")}
    return [done.get(identity(row), row) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks: whether it runs")
    parser.add_argument("--out", type=Path, help="JSON file [default: benchmarks/results/gpu-<GPU>.json on a GPU]")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds, at most [default: {BUDGET:.0f}]")
    parser.add_argument("--only", help="groups of rows: caps,longest,lengths,peers,upper half")
    parser.add_argument("--model", help="rows of these models, as their presets are named")
    parser.add_argument("--lengths", help="rows of these lengths, such as 1024,2048")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, and measure the rest")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp())
    run = Run([], args.out, tiny=args.tiny, budget=args.budget, folder=folder)
    try:
        if wrong := run.ask_about():
            sys.exit(f"this machine cannot be measured: {wrong}\nsee python benchmarks/gpu.py --help")
        if not run.about["gpu"] and not args.tiny:
            sys.exit("no GPU: python benchmarks/gpu.py --tiny runs the same rows in small on a CPU")
        if not args.tiny and not args.out:
            run.out = RESULTS / f"gpu-{slug(run.about['machine'])}.json"
        wanted = {"group": args.only, "model": args.model, "length": args.lengths}
        run.rows = [
            row
            for row in plan("TRL SFTTrainer" if run.about["trl"] else "transformers Trainer")
            if all(not some or row[key] is None or str(row[key]) in some.split(",") for key, some in wanted.items())
        ]
        if args.tiny:
            for row in run.rows:
                row["rank"] //= 8
                row["length"] = row["length"] and row["length"] // 32
        if args.resume and run.out and run.out.exists():
            run.rows = kept(run.out, run.rows)
        run.measure()
        run.console.print(run.table())
        run.console.print(f"written: {run.out}" if run.out else "nothing was written: --out FILE", markup=False)
        return 0 if any(row.get("status") == "ok" for row in run.rows) else 1
    finally:
        run.end()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
