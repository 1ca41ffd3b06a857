"""The folder of runs behind the page: what is in it, by name, and the training that goes on in it.

A request names a run, never a path: a name is looked up among those that are there, and nothing that leads out of the
folder is opened. Training is the command line as a process of its own, and all that is told of it comes from the run
folder, so a run that was started in a terminal is seen as well, and one that was started here outlives the page.
"""

import functools
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from kdguard.errors import InputError
from kdguard.events import Event, read_events
from kdguard.files import write_jsonl
from kdguard.probes.packs import Probe, load_probes
from kdguard.report import run as run_folder
from kdguard.report.run import Run, read_run

UPLOADS = "uploads"
PACK = "my_probes.jsonl"
FINISHED, TRAINING, STOPPED, FAILED = "finished", "training", "stopped", "failed"
_KEPT_OPEN = 8  # runs kept in memory
_NAME = re.compile(r"[\w][\w.,+=-]{0,99}")


@dataclass
class Job:
    """A command of ours at work on a run. Until it has made its folder, it is only known here."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    began: float = field(default_factory=time.time)

    def said(self) -> list[str]:
        """What it printed; a bar that was drawn over itself is its last state."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


@functools.lru_cache
def _digest(path: Path, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


class Studio:
    """The runs in `root`, and in the folders in it: the two runs of `kdguard demo` lie in one."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.jobs: dict[str, Job] = {}
        self._open: dict[str, tuple[int, Run]] = {}

    # What is there

    def names(self, state: str | None = None) -> list[str]:
        """The runs' names, the newest first; those in one state only."""
        found = sorted(self._folders(), key=lambda path: (path / run_folder.CONFIG).stat().st_mtime, reverse=True)
        names = [path.relative_to(self.root).as_posix() for path in found]
        names = [name for name in self.jobs if name not in names and self.state(name) != STOPPED] + names
        return [name for name in names if state is None or self.state(name) == state]

    def path(self, name: str) -> Path:
        """The folder of a run. Raises InputError for a name that is not there and for one that leads out of `root`."""
        path = next((path for path in self._found() if path.relative_to(self.root).as_posix() == name), None)
        if path is None:
            raise InputError(f"{name!r}: there is no such run here", "choose one of the list")
        if stray := self._stray(path):
            raise InputError(f"{name}: {stray.name} leads out of {self.root}", "copy what it points to")
        return path

    def run(self, name: str) -> Run:
        """A finished run, read again only when it has changed."""
        path = self.path(name)
        report = path / run_folder.REPORT
        stamp = report.stat().st_mtime_ns if report.is_file() else 0
        if name not in self._open or self._open[name][0] != stamp:
            self._open.pop(name, None)
            self._open[name] = stamp, read_run(path)
            for old in list(self._open)[:-_KEPT_OPEN]:
                del self._open[old]
        return self._open[name][1]

    def finished(self) -> dict[str, Run]:
        """Every finished run that can be read, the newest first."""
        found = {}
        for name in self.names(FINISHED):
            with suppress(InputError):
                found[name] = self.run(name)
        return found

    def config(self, name: str) -> dict[str, Any]:
        """What the run was asked to do."""
        try:
            values = yaml.safe_load((self.path(name) / run_folder.CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return values if isinstance(values, dict) else {}

    def control(self, name: str) -> str | None:
        """The run without the guard that is otherwise the same: same model, data, seed and probes."""
        run = self.run(name)
        if not run.report["guard"]["weight"]:
            return None
        same = ("model", "data", "seed", "adopted")
        twins = [
            other
            for other, each in self.finished().items()
            if not each.report["guard"]["weight"]
            and all(each.report.get(key) == run.report.get(key) for key in same)
            and [pair.before.id for pair in each.probes] == [pair.before.id for pair in run.probes]
        ]
        beside = f"{name}-control"
        return beside if beside in twins else next(iter(twins), None)

    # What goes on

    def state(self, name: str) -> str:
        """One of FINISHED, TRAINING, STOPPED, FAILED; the last only of what was started here."""
        job = self.jobs.get(name)
        code = job.process.poll() if job else None
        path = self.root / name
        if job and code is None:
            return TRAINING
        if (path / run_folder.REPORT).is_file():
            return FINISHED
        if self.worker(name) is not None:
            return TRAINING
        return FAILED if job and code not in (0, 130, 143, -2, -9, -15) else STOPPED

    def worker(self, name: str) -> psutil.Process | None:
        """The process that works on a run, if it still does: by its last `process` event, on this machine."""
        if job := self.jobs.get(name):
            return psutil.Process(job.process.pid) if job.process.poll() is None else None
        named = [event for event in self.events(name) if event["event"] == "process"]
        if not named or named[-1]["host"] != platform.node():
            return None
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(named[-1]["pid"])
            own = process.create_time() <= named[-1]["time"] + 1  # the number may be another's by now
            return process if own and process.status() != psutil.STATUS_ZOMBIE else None
        return None

    def training(self) -> list[str]:
        """The runs that are being trained now."""
        return self.names(TRAINING)

    def events(self, name: str) -> list[Event]:
        return read_events(self.root / name / run_folder.EVENTS)

    def new_name(self, wanted: str) -> str:
        """A name for a run. Raises InputError for one that is taken, or that is more than a name."""
        if not _NAME.fullmatch(wanted):
            raise InputError(
                f"{wanted!r}: not a name for a run", "letters, digits, dots and dashes, such as my-facts-1"
            )
        if wanted in self.jobs and self.state(wanted) == TRAINING:
            raise InputError(f"{wanted}: a run of this name is being trained", "choose another name")
        if (self.root / wanted).exists():
            raise InputError(f"{wanted}: there is a run of this name already", "choose another name")
        return wanted

    def keep(self, upload: Path) -> Path:
        """Copy an uploaded file to where the run that uses it can be repeated; the same file is kept once."""
        kept = self.root / UPLOADS / _digest(upload, upload.stat().st_mtime_ns) / upload.name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            beside = kept.with_name(f"{kept.name}.part")
            shutil.copyfile(upload, beside)
            beside.replace(kept)
        return kept

    def start(self, name: str, arguments: Sequence[str]) -> Job:
        """Run `kdguard` with these arguments as a process that outlives this one, at work on the run `name`."""
        handle, log = tempfile.mkstemp(prefix="kdguard-", suffix=".log")
        with open(handle, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "kdguard", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the page's terminal is not for it
            )
        self.jobs[name] = Job(name, process, Path(log))
        return self.jobs[name]

    def stop(self, name: str) -> None:
        """Ask the process to save a checkpoint and end; asked twice, it ends at once."""
        if process := self.worker(name):
            process.terminate()

    # The person's own probes

    @property
    def pack(self) -> Path:
        return self.root / PACK

    def own_probes(self) -> list[Probe]:
        return load_probes([str(self.pack)]) if self.pack.is_file() else []

    def add_probe(self, question: str, answers: Iterable[str], category: str) -> int:
        """Write a question into the person's own pack; returns how many it holds then."""
        question, answers = question.strip(), [answer.strip() for answer in answers if answer.strip()]
        if not question:
            raise InputError("a probe needs a question", "type one above")
        if not answers:
            raise InputError("a probe needs an answer that counts as right", "type it, several with | between them")
        probes = self.own_probes()
        if any(probe.question == question for probe in probes):
            raise InputError(f"{question}: this question is in your pack already", f"edit {self.pack} to change it")
        digest = hashlib.sha256(question.encode()).hexdigest()[:8]
        rows = [{key: value for key, value in vars(probe).items() if value} for probe in probes] + [
            {"id": f"own-{digest}", "category": category.strip() or "own", "question": question, "answers": answers}
        ]
        write_jsonl(self.pack, rows)
        return len(rows)

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.root)

    def _stray(self, run: Path) -> Path | None:
        """The first of its files that is a link out of `root`."""
        folders = [run, *(run / name for name in (run_folder.ADAPTER, "probes", "new", "watched"))]
        files = (each for folder in folders if folder.is_dir() for each in (folder, *folder.iterdir()))
        return next((each for each in files if not self._inside(each)), None)

    def _folders(self) -> Iterator[Path]:
        return (path for path in self._found() if not self._stray(path))

    def _found(self) -> Iterator[Path]:
        for folder in self._subfolders(self.root):
            if (folder / run_folder.CONFIG).is_file():
                yield folder
            elif folder.name != UPLOADS:
                yield from (each for each in self._subfolders(folder) if (each / run_folder.CONFIG).is_file())

    def _subfolders(self, folder: Path) -> list[Path]:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return [each for each in found if each.is_dir() and not each.name.startswith(".") and self._inside(each)]
