"""The run folder: the names in it, files that appear whole or not at all, and reading it back."""

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from kdguard.config_file import read_config
from kdguard.errors import InputError
from kdguard.events import read_events
from kdguard.files import refuse_foreign, sync, write_jsonl
from kdguard.probes.score import Answer
from kdguard.report import schema
from kdguard.report.contract import Report
from kdguard.report.figures import Pair, pair
from kdguard.report.schema import read_answers, read_report

CONFIG = "config.yaml"
EVENTS = "events.jsonl"
FINGERPRINT = "fingerprint.json"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
REPORT = "report.json"
ANSWERS = "watched", "probes", "new"
DIAL = "dial.json"
DIALLED = "dialled"  # what a dial puts in the place of the old, while it does
EXPLAIN = "explain.json"
EXPORTED = "exported"
LOCK = ".lock"
_BEFORE = {LOCK, FINGERPRINT, f"{FINGERPRINT}.part", f"{CONFIG}.part"}  # there before a run has begun

_P = ParamSpec("_P")
_T = TypeVar("_T")
_AGAIN = "run it again, or take the folder from where it came once more"


@dataclass(frozen=True)
class Run:
    """A finished run. `config` is its resolved TuneConfig, as keys; `watched` is empty where there was no budget."""

    path: Path
    config: dict[str, Any]
    report: Report
    probes: list[Pair]
    new: list[Pair]
    watched: list[Pair]


def read_run(path: Path) -> Run:
    """Raises InputError when `path` is not a finished run."""
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder", "kdguard tune DATA writes one and names it at its end")
    if not is_finished(path):
        if (path / CONFIG).is_file():
            raise InputError(f"{path}: this run has not finished", f"kdguard tune --resume --out {path}")
        raise InputError(f"{path}: not a run folder (it has no {REPORT})", "name a folder that kdguard tune wrote")
    config = read_config(path / CONFIG)
    wanted = {"model": str, "quant": str, "revision": str | None, "data": str | list | None}
    if wrong := [key for key, kind in wanted.items() if key not in config or not isinstance(config[key], kind)]:
        raise InputError(f"{path / CONFIG}: found no {wrong[0]} of a run", _AGAIN)
    try:
        return Run(
            path,
            config,
            read_report(path / REPORT),
            probes=read_pairs(path / "probes"),
            new=read_pairs(path / "new"),
            watched=read_pairs(path / "watched") if (path / "watched").exists() else [],
        )
    except ValueError as error:
        raise InputError(f"{path}: this run folder is damaged ({error})", _AGAIN) from None


def base_of(run: Run) -> tuple[Any, ...]:
    """Equal for runs that one loaded base can answer for; an adapter may bring a tokenizer of its own."""
    own = hashlib.sha256()
    for file in sorted((run.path / ADAPTER).glob("*token*")) + sorted((run.path / ADAPTER).glob("*.jinja")):
        own.update(file.read_bytes())
    return run.config["model"], run.config["quant"], run.config["revision"], own.hexdigest()


def read_explained(path: Path) -> dict[str, Any] | None:
    """What `kdguard explain` found of a run, if it was asked. Raises InputError where the file is damaged."""
    return schema.read_explained(path / EXPLAIN) if (path / EXPLAIN).exists() else None


def read_exported(path: Path, report: Report) -> dict[str, Answer]:
    """The answers of the run's last export that was asked, by the question's id; none where there is no such export."""
    asked = [each["answers"] for each in report.get("exported", []) if each["answers"]]
    files = sorted((path / asked[-1]).glob("*.jsonl")) if asked else []
    return {answer.id: answer for file in files for answer in read_answers(file)}


def refuse_used(path: Path, hint: str) -> None:
    """Raises InputError when there is something at `path` already that is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(each.name not in _BEFORE for each in path.iterdir())):
        raise InputError(f"{path}: this folder is not empty", hint)


@contextmanager
def at_work(path: Path) -> Iterator[None]:
    """Keep other processes from working on a run; the folder is made if it is not there. Finishes a dial's last step.

    The system ends it with the process, however that ends. Raises InputError while another one is at work on it.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        trains = not any((path / name).exists() for name in (REPORT, DIALLED))
        last = [event for event in read_events(path / EVENTS) if event["event"] == "process"][-1:] if trains else []
        who = f"process {last[0]['pid']} on {last[0]['host']}" if last else "another process"
        raise InputError(
            f"{path}: {who} is at work on this run", "wait for it or stop it, or take another folder"
        ) from None
    try:
        finish_dial(path)
        yield
    finally:
        (path / LOCK).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):
                path.rmdir()  # nothing has been written


def alone(story: Callable[Concatenate[Run, _P], _T]) -> Callable[Concatenate[Run, _P], _T]:
    """Tell a story of a run `at_work` on it, and of the run as it is by then: another process may have dialled it."""

    @functools.wraps(story)
    def told(run: Run, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with at_work(run.path):
            return story(read_run(run.path), *args, **kwargs)

    return told


def is_finished(path: Path) -> bool:
    """Whether a run has its report, once a dial that was cut short in its last step has been finished."""
    if (path / DIALLED).is_dir():
        with at_work(path):
            pass
    return (path / REPORT).is_file()


def finish_dial(path: Path) -> None:
    """Put what lies in `dialled/` in the place of the old, the report last. Cut short, it can be done again.

    Whole things are renamed, so that a link in a folder that came from others leads nowhere.
    """
    new = path / DIALLED
    if not new.is_dir() or new.is_symlink():
        return
    if (new / REPORT).is_file():
        (path / REPORT).unlink(missing_ok=True)
        (path / EXPLAIN).unlink(missing_ok=True)  # at another strength other probes are forgotten
        shutil.rmtree(path / EXPORTED, ignore_errors=True)
        for name in (ADAPTER, *ANSWERS, "report.html"):
            if (new / name).exists():
                if (path / name).exists():
                    (path / name).rename(new / f"{name}.old")
                (new / name).rename(path / name)
        sync(path)
        (new / REPORT).rename(path / REPORT)
        sync(path)
    shutil.rmtree(new)


def unfinished_config(path: Path) -> Path:
    """The config of a run that can be gone on with. Raises InputError where it has finished or is not ours."""
    if not (path / CONFIG).is_file():
        raise InputError(f"{path}: there is no run here to go on with", f"kdguard tune DATA --out {path}")
    if (path / REPORT).is_file():
        raise InputError(f"{path}: this run has finished", f"kdguard compare {path}")
    refuse_foreign(path)
    return path / CONFIG


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    write_jsonl(path, map(asdict, answers))


def read_pairs(folder: Path) -> list[Pair]:
    """`before.jsonl` and `after.jsonl` of a folder of answers."""
    return pair(*(read_answers(folder / f"{when}.jsonl") for when in ("before", "after")))
