"""Runs `kdguard` in processes forked from one that has its libraries loaded already, and may do them harm.

The server reads a job a line, as JSON, and answers with how it ended. A job: `args` of the command line; `cwd`; `log`,
where what it prints goes; `uid`, whose it is; `processes`, how many share the run, as torchrun starts them: when one
fails the others get SIGTERM. With `out`, the run folder, something may be done to it:

    kill_at, kill_after   SIGKILL at so many file operations within `out`, or after so many seconds
    kill_on               SIGKILL at the first operation on a path that ends so
    signals               [phase, number, ...]: these signals, half a second apart, as soon as that phase has begun
    full_at               the disk is full from so many openings to write within `out` on
    full_in               [phase, bytes]: a file takes all but so many bytes of the disk as soon as that phase begins
    clock                 seconds by which the clock moves at each look at it
    no_memory_at          in process 1 alone memory runs out after so many optimiser steps
"""

import atexit
import codecs
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any

from kdguard.events import Events

ROOT = Path(__file__).parent.parent

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
BALLAST = "ballast"
# As `quiet_libraries` has it before they are loaded.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass
class Ended:
    """How a process ended, and what its harm has told."""

    returncode: int
    stdout: str
    stderr: str
    operations: int = 0  # on the run's files
    written: int = 0  # openings of them to write
    seconds_to_end: float = 0.0  # from the signal


class Forked:
    """The server, as those see it who send it jobs."""

    def __init__(self, log: Path, **environment: str) -> None:
        self.log = str(log)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            env={**os.environ, **QUIET, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args: object, cwd: Path = ROOT, **job: Any) -> Ended:
        line = json.dumps({"args": list(map(str, args)), "cwd": str(cwd), "log": self.log, **job})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def harm(job: dict[str, Any], told: dict[str, Any]) -> None:
    out = job["out"]
    told |= {"operations": 0, "written": 0}

    def operation(event: str, args: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not isinstance(args[0], str | os.PathLike):
            return
        if not os.fspath(args[0]).startswith(out) or os.fspath(args[0]).startswith(job["log"]):
            return
        told["operations"] += 1
        if told["operations"] == job.get("kill_at") or os.fspath(args[0]).endswith(job.get("kill_on", "\0")):
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            told["written"] += 1
            if told["written"] >= job.get("full_at", float("inf")):
                raise OSError(ENOSPC, os.strerror(ENOSPC), args[0])

    def send(*numbers: int) -> None:
        time.sleep(0.05)
        told["signalled"] = time.monotonic()
        Path(f"{job['log']}.told").write_text(json.dumps(told))
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    def fill(left: int) -> None:
        disk = os.statvfs(out)
        with open(Path(out).parent / BALLAST, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - left)

    emit = Events.emit

    def emit_and_harm(self: Events, event: str, **values: Any) -> None:
        emit(self, event, **values)
        if event == "phase" and values["name"] == job.get("signals", [None])[0]:
            threading.Thread(target=send, args=job["signals"][1:], daemon=True).start()
        if event == "phase" and values["name"] == job.get("full_in", [None])[0]:
            fill(job["full_in"][1])

    Events.emit = emit_and_harm  # type: ignore[method-assign]
    if "no_memory_at" in job and os.environ["RANK"] == "1":
        import torch

        from kdguard.guard.trainer import GuardedTrainer

        compute = GuardedTrainer.compute_loss

        def compute_or_not(self: GuardedTrainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == job["no_memory_at"]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(self, *args, **kwargs)

        GuardedTrainer.compute_loss = compute_or_not  # type: ignore[method-assign]
    sys.addaudithook(operation)
    if "kill_after" in job:
        threading.Timer(job["kill_after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    if "clock" in job:
        real, looks = time.time, iter(range(10**9))
        time.time = lambda: real() + next(looks) * job["clock"]


def run(job: dict[str, Any]) -> None:
    """Never returns."""
    from kdguard.__main__ import main

    told: dict[str, Any] = {}
    os.chdir(job["cwd"])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may be under nohup
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{job['log']}.{name}", os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["kdguard", *job["args"]]
    if "uid" in job:
        codecs.lookup("utf-8-sig")  # Python's own files may be only root's to read
        os.setuid(job["uid"])
    if "out" in job:
        harm(job, told)
    code = 99
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    if "uid" not in job and os.environ.get("RANK", "0") == "0":
        Path(f"{job['log']}.told").write_text(json.dumps(told))
    os._exit(code)


def start(job: dict[str, Any], environment: dict[str, str]) -> int:
    child = os.fork()
    if child == 0:
        os.environ |= environment
        run(job)
    return child


def environments(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each of the processes."""
    if processes == 1:
        return [{}]
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def serve() -> None:
    import kdguard.cli
    import kdguard.tuning  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        told = Path(f"{job['log']}.told")
        told.unlink(missing_ok=True)
        logs = {name: Path(f"{job['log']}.{name}") for name in ("stdout", "stderr")}
        for log in logs.values():
            log.unlink(missing_ok=True)
            log.touch(0o666)
        children = {start(job, environment) for environment in environments(job.get("processes", 1))}
        status = 0
        while children:
            child, how = os.wait()
            children.remove(child)
            if how and not status:
                status = how
                for other in children:
                    os.kill(other, signal.SIGTERM)
        ended = {name: log.read_text(errors="replace") for name, log in logs.items()}
        ended |= json.loads(told.read_text()) if told.exists() else {}
        if "signalled" in ended:
            ended["seconds_to_end"] = time.monotonic() - ended.pop("signalled")
        print(json.dumps({"returncode": os.waitstatus_to_exitcode(status), **ended}), flush=True)


if __name__ == "__main__":
    serve()
