"""The run folder: the names in it, files that appear whole or not at all, and reading it back."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdguard.config_file import read_config
from kdguard.errors import InputError
from kdguard.events import read_events
from kdguard.files import refuse_foreign, write_jsonl
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
DIAL = "dial.json"
EXPLAIN = "explain.json"
EXPORTED = "exported"
LOCK = ".lock"


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
    if not (path / REPORT).is_file():
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
    if path.exists() and (not path.is_dir() or any(each.name != LOCK for each in path.iterdir())):
        raise InputError(f"{path}: this folder is not empty", hint)


@contextmanager
def at_work(path: Path) -> Iterator[None]:
    """Keep other processes from working on a run; the folder is made if it is not there.

    The system ends it with the process, however that ends. Raises InputError while another one is at work on it.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        last = [event for event in read_events(path / EVENTS) if event["event"] == "process"][-1:]
        who = f"process {last[0]['pid']} on {last[0]['host']}" if last else "another process"
        raise InputError(
            f"{path}: {who} is at work on this run", "wait for it or stop it, or give another --out"
        ) from None
    try:
        yield
    finally:
        (path / LOCK).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):
                path.rmdir()  # nothing has been written


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
