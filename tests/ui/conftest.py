"""A folder of runs, the page over it as a process of its own, and a browser to look at it with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdguard.config import TuneConfig
from kdguard.events import Events
from kdguard.probes.packs import load_probes
from kdguard.probes.score import Answer
from kdguard.report.build import build_report, write_report
from kdguard.report.run import CONFIG, write_answers
from kdguard.ui.studio import PACK
from tests.conftest import ROOT
from tests.test_cli import DATA, kdguard

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</textarea></style><svg onload=alert(1)>",
    "${alert(1)} {{alert(1)}}",
    "[bold] `a` **b** $x$",
    "unbroken" * 40,
)


def write_run(out: Path, before: Sequence[Answer], after: Sequence[Answer], *, data: str, guard: bool = True) -> Path:
    """A finished run of these answers to old questions, on the embedded model. It has no adapter."""
    config = TuneConfig(data=data, model="demo", guard=guard)
    for folder, answers in (("probes", (before, after)), ("new", ([], []))):
        write_answers(out / folder / "before.jsonl", answers[0])
        write_answers(out / folder / "after.jsonl", answers[1])
    cost = {"steps": 1, "tokens": 2, "seconds": 3.0, "tokens_per_second": 1.0, "peak_memory_gib": 0.1}
    report = build_report(config, probes=(before, after), new=([], []), drift=0.1, cost=cost)
    (out / CONFIG).write_text(config.to_yaml())
    events = Events()
    events.path = out / "events.jsonl"
    write_report(out, report, events)
    return out


def answers(texts: Sequence[str], right: bool) -> list[Answer]:
    return [
        Answer(f"{i}", f"category {i % 7} {text}", f"{text}?", (text,), text if right else f"not {text}", right)
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """What a week leaves: a plain and a guarded run of the same rows, one with hostile text, and the own pack."""
    folder = tmp_path_factory.mktemp("studio") / "runs"
    folder.mkdir()
    data = folder.parent / "facts.jsonl"
    data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:40]))
    pack = load_probes(["world"])[::40]
    (folder / PACK).write_text(
        "".join(
            json.dumps({key: value for key, value in vars(probe).items() if value and key != "messages"}) + "\n"
            for probe in pack
        )
    )
    for name, flags in (("plain", ["--no-guard"]), ("guarded", [])):
        done = kdguard(
            *["tune", data, "--model", "demo", "--epochs", 3, "--probes", folder / PACK, "--prompts", 1],
            *["--out", folder / name, *flags],
        )
        assert done.returncode == 0, done.stderr
    write_run(folder / "hostile", answers(HOSTILE, True), answers(HOSTILE, False), data=f"{HOSTILE[1]}.jsonl")
    return folder


@dataclass
class Server:
    address: str
    port: int
    process: "subprocess.Popen[str]"
    seconds: float  # from the command to the address
    said: str


@contextmanager
def serving(*arguments: object) -> Iterator[Server]:
    """`kdguard ui`, ended by Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kdguard", "ui", *map(str, arguments), "--port", str(port)]
    began = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    ) as process:
        try:
            said = process.stdout.readline()
            yield Server(f"http://127.0.0.1:{port}/", port, process, time.perf_counter() - began, said)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) in (0, 130)


@pytest.fixture(scope="session")
def server(runs) -> Iterator[Server]:
    with serving(runs / "guarded") as found:
        yield found


@pytest.fixture
def open_page(browse) -> Iterator[Callable]:
    """`open_page(address, width, scheme)`: a page; by the end of the test it must have complained of nothing."""
    wrong: list[list[str]] = []

    def open_it(address: str, width: int = 1440, scheme: str = "light"):
        page, complaints = browse(address, width, scheme, allowed=address)
        wrong.append(complaints)
        return page

    yield open_it
    assert [complaint for complaints in wrong for complaint in complaints] == []


def go(page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()
