"""The folder of runs behind the page: what is in it, by name, and the training that goes on in it.

A request names a run, never a path: a name is looked up among those that are there, and nothing that leads out of the
folder is opened. Training is the command line as a process of its own, and all that is told of it comes from the run
folder, so a run that was started in a terminal is seen as well, and one that was started here outlives the page.
"""

import atexit
import functools
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kdguard.config_file import read_config
from kdguard.errors import InputError, KdguardError
from kdguard.events import Event, read_events
from kdguard.report import run as run_folder
from kdguard.report.contract import Report
from kdguard.report.run import Run, is_finished, read_run
from kdguard.report.schema import read_report
from kdguard.ui.pack import PACK

UPLOADS = "uploads"
FINISHED, TRAINING, STOPPED, FAILED = "finished", "training", "stopped", "failed"
_KEPT_OPEN = 8  # runs whose answers are kept in memory
_ASKED = (0, 129, 130, 143, -1, -2, -15, 15)  # how a process ends that was asked to; 15 is Windows'
_PATIENCE = 60  # seconds for a process to save its checkpoint, before it may be asked again
_NAME = re.compile(r"[\w][\w.,+=-]{0,99}")


@dataclass
class Job:
    """A command of ours at work on a run. Until it has made its folder, it is only known here."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> list[str]:
        """What it printed; a bar that was drawn over itself is its last state."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


class Studio:
    """The runs in `root`, and in the folders in it: the two runs of `kdguard demo` lie in one."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.scratch = Path(tempfile.mkdtemp(prefix="kdguard-"))  # logs and exports, gone with this process
        atexit.register(shutil.rmtree, self.scratch, ignore_errors=True)
        self._jobs: dict[str, Job] = {}
        self._reports: dict[Path, tuple[int, Report]] = {}
        self._open: dict[str, tuple[int, Run]] = {}
        self._workers: dict[Path, tuple[int, Event | None]] = {}
        self._asked: dict[int, float] = {}  # to stop, by process
        self._lock = threading.RLock()

    # What is there

    def names(self, *states: str) -> list[str]:
        """The runs' names, the newest first; those in one of the states only."""
        found = []
        for path in self._folders():
            with suppress(OSError):
                found.append(((path / run_folder.CONFIG).stat().st_mtime, self._name(path)))
        names = [name for _, name in sorted(found, reverse=True)]
        names = [name for name in list(self._jobs) if name not in names and self.state(name) != STOPPED] + names
        return [name for name in names if not states or self.state(name) in states]

    def path(self, name: str) -> Path:
        """The folder of a run. Raises InputError for a name that is not there and for one that leads out of `root`."""
        path = next((path for path in self._found() if self._name(path) == name), None)
        if path is None:
            raise InputError(f"{name!r}: there is no such run here", "choose one of the list")
        if stray := self._stray(path):
            raise InputError(f"{name}: {stray.name} leads out of {self.root}", "copy what it points to")
        return path

    def reports(self) -> dict[str, Report]:
        """The report of every finished run, the newest first; one that cannot be read is left out."""
        found = {}
        for name in self.names():
            path = self.root / name / run_folder.REPORT
            with suppress(OSError, InputError):
                is_finished(path.parent)  # a dial that was cut short
                stamp = path.stat().st_mtime_ns
                if self._reports.get(path, (0, {}))[0] != stamp:
                    self._reports[path] = stamp, read_report(path)
                found[name] = self._reports[path][1]
        return found

    def run(self, name: str) -> Run:
        """A finished run with its answers, read again only when it has changed."""
        path = self.path(name)
        report = path / run_folder.REPORT
        stamp = report.stat().st_mtime_ns if report.is_file() else 0
        with self._lock:
            kept = self._open.pop(name, None)
            run = kept[1] if kept and kept[0] == stamp else read_run(path)
            self._open[name] = stamp, run
            for old in list(self._open)[:-_KEPT_OPEN]:
                del self._open[old]
        return run

    def config(self, name: str) -> dict[str, Any]:
        """What the run was asked to do; nothing, where that cannot be read."""
        with suppress(OSError, InputError):
            return read_config(self._place(name) / run_folder.CONFIG)
        return {}

    def control(self, name: str) -> str | None:
        """The run without the guard that is otherwise the same: same model, data, seed and probes."""
        reports = self.reports()
        mine = reports[name]
        same = ("model", "data", "seed", "adopted")
        alike = [
            other
            for other, report in reports.items()
            if mine["guard"]["weight"]
            and not report["guard"]["weight"]
            and all(report.get(key) == mine.get(key) for key in same)
            and report["kept"]["n"] == mine["kept"]["n"]
        ]
        asked = [pair.before.id for pair in self.run(name).probes]
        for other in sorted(alike, key=lambda other: other != f"{name}-control"):
            if [pair.before.id for pair in self.run(other).probes] == asked:
                return other
        return None

    # What goes on

    def state(self, name: str) -> str:
        """One of FINISHED, TRAINING, STOPPED, FAILED; the last only of what was started here."""
        path = self._place(name)
        with suppress(OSError, InputError):
            if is_finished(path):
                return FINISHED
        if self.worker(name):
            return TRAINING
        return STOPPED if self._code(name) in (None, *_ASKED) else FAILED

    def worker(self, name: str) -> psutil.Process | None:
        """The process that works on a run, if it still does: ours, or by the run's last `process` event."""
        job = self._jobs.get(name)
        with suppress(psutil.Error):
            if job and job.process.poll() is None:
                return psutil.Process(job.process.pid)
            last = self._last_process(self._place(name) / run_folder.EVENTS)
            if last and last["host"] == platform.node():
                process = psutil.Process(last["pid"])
                own = process.create_time() <= last["time"] + 1  # the number may be another's by now
                if own and process.status() != psutil.STATUS_ZOMBIE and "kdguard" in " ".join(process.cmdline()):
                    return process
        return None

    def training(self) -> list[str]:
        """The runs that are being trained now; one that trains its unguarded twin among them."""
        going = self.names(TRAINING)
        ours = [name for name, job in list(self._jobs.items()) if job.process.poll() is None]
        return going or ours

    def refuse_busy(self) -> None:
        """Raise KdguardError while a run is being trained: it has the memory."""
        if busy := self.training():
            raise KdguardError(f"{busy[0]} is being trained and needs the memory", "wait for it, or stop it")

    def events(self, name: str) -> list[Event]:
        return read_events(self._place(name) / run_folder.EVENTS)

    def said(self, name: str) -> list[str]:
        """What the command that was started here has printed, if it does not tell by events."""
        job = self._jobs.get(name)
        silent = job and (self._code(name) not in (None, *_ASKED) or not self.events(name))
        said = job.said() if job and silent else []
        if self._code(name) == -9:
            said.append(
                "the system ended it, most likely because the memory ran out: a shorter length, a smaller batch"
            )
        return said

    def new_name(self, wanted: str) -> str:
        """A name for a run. Raises InputError for one that is taken, or that is more than a name."""
        if not _NAME.fullmatch(wanted) or wanted in (UPLOADS, PACK):
            raise InputError(
                f"{wanted!r}: not a name for a run", "letters, digits, dots and dashes, such as my-facts-1"
            )
        job = self._jobs.get(wanted)
        if (self.root / wanted).exists() or (job and job.process.poll() is None):
            raise InputError(f"{wanted}: there is a run of this name already", "choose another name")
        return wanted

    def keep(self, upload: Path) -> Path:
        """Copy an uploaded file to where the run that uses it can be repeated; the same file is kept once."""
        kept = self.root / UPLOADS / _digest(upload, upload.stat().st_mtime_ns) / upload.name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".part", delete=False) as beside:
                shutil.copyfile(upload, beside.name)
            Path(beside.name).replace(kept)
        return kept

    def forget(self, upload: Path) -> None:
        """Remove what was kept of an uploaded file that no run has used."""
        kept = self.keep(upload)
        if not any(str(kept) in str(self.config(name).get("data")) for name in self.names()):
            shutil.rmtree(kept.parent, ignore_errors=True)

    def start(self, name: str, arguments: Sequence[str]) -> Job:
        """Run `kdguard` with these arguments as a process that outlives this one, at work on the run `name`.

        Raises KdguardError while another run is being trained.
        """
        with self._lock:
            self.refuse_busy()
            handle, log = tempfile.mkstemp(dir=self.scratch, suffix=".log")
            with open(handle, "wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "kdguard", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the page's terminal is not for it
                )
            self._jobs[name] = Job(process, Path(log))
            return self._jobs[name]

    def stop(self, name: str) -> None:
        """Ask the process to save a checkpoint and end. Asked again before it can have done so, it is not disturbed."""
        process = self.worker(name)
        with self._lock, suppress(psutil.Error):
            if process and not self.stopping(name):
                self._asked[process.pid] = time.monotonic()
                process.terminate()

    def stopping(self, name: str) -> bool:
        """Whether it was asked to stop a moment ago."""
        process = self.worker(name)
        return process is not None and time.monotonic() - self._asked.get(process.pid, -_PATIENCE) < _PATIENCE

    def _code(self, name: str) -> int | None:
        job = self._jobs.get(name)
        return job.process.poll() if job else None

    def _place(self, name: str) -> Path:
        return self.root / name if name in self._jobs else self.path(name)

    def _last_process(self, path: Path) -> Event | None:
        """The last `process` event, read again only when the file has changed."""
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        if self._workers.get(path, (None,))[0] != stamp:
            named = [event for event in read_events(path) if event["event"] == "process"]
            self._workers[path] = stamp, named[-1] if named else None
        return self._workers[path][1]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.root)

    def _stray(self, run: Path) -> Path | None:
        """The first of its files that is a link out of `root`."""
        folders = [run, *(run / name for name in (run_folder.ADAPTER, "probes", "new", "watched"))]
        files = (each for folder in folders if folder.is_dir() for each in (folder, *folder.iterdir()))
        return next((each for each in files if not self._inside(each)), None)

    def _folders(self) -> Iterator[Path]:
        for path in self._found():
            with suppress(OSError):
                if not self._stray(path):
                    yield path

    def _found(self) -> Iterator[Path]:
        for folder in self._subfolders(self.root):
            if (folder / run_folder.CONFIG).is_file():
                yield folder
            elif folder.name != UPLOADS:
                yield from (each for each in self._subfolders(folder) if (each / run_folder.CONFIG).is_file())

    def _subfolders(self, folder: Path) -> list[Path]:
        with suppress(OSError):
            found = sorted(folder.iterdir())
            return [each for each in found if each.is_dir() and not each.name.startswith(".") and self._inside(each)]
        return []


@functools.lru_cache
def _digest(path: Path, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
