"""The folder behind the page: what is there, which is whose control, who works on it, and the person's own probes."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest

from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.ui.progress import progress
from kdguard.ui.studio import FAILED, FINISHED, STOPPED, TRAINING, Studio
from tests.ui.conftest import answers, write_run

TEXTS = ["one", "two"]


def unfinished(folder, name="run", **process):
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("model: demo\n")
    events = Events()
    events.path = path / "events.jsonl"
    if process:
        events.emit("process", **process)
    return path


def test_runs_are_found_by_name_in_the_folder_and_one_below(tmp_path):
    write_run(tmp_path / "one", answers(TEXTS, True), answers(TEXTS, True), data="a.jsonl")
    write_run(tmp_path / "demo" / "guarded", answers(TEXTS, True), answers(TEXTS, True), data="a.jsonl")
    write_run(tmp_path / "one" / "known-only" / "run", answers(TEXTS, True), answers(TEXTS, True), data="a.jsonl")
    unfinished(tmp_path, "stopped")
    (tmp_path / "uploads" / "abc").mkdir(parents=True)
    studio = Studio(tmp_path)
    assert set(studio.names()) == {"one", "demo/guarded", "stopped"}
    assert set(studio.finished()) == {"one", "demo/guarded"}
    assert studio.names(STOPPED) == ["stopped"]


def test_a_damaged_run_hides_no_other(tmp_path):
    write_run(tmp_path / "whole", answers(TEXTS, True), answers(TEXTS, True), data="a.jsonl")
    bad = write_run(tmp_path / "bad", answers(TEXTS, True), answers(TEXTS, True), data="a.jsonl")
    (bad / "report.json").write_text("{")
    (bad / "config.yaml").write_text("[")
    studio = Studio(tmp_path)
    assert set(studio.finished()) == {"whole"} and studio.config("bad") == {}
    with pytest.raises(InputError, match="damaged"):
        studio.run("bad")


def test_a_run_that_was_changed_is_read_again(tmp_path):
    path = write_run(tmp_path / "run", answers(TEXTS, True), answers(TEXTS, True), data="a.jsonl")
    studio = Studio(tmp_path)
    assert studio.run("run") is studio.run("run")
    report = json.loads((path / "report.json").read_text()) | {"strength": 0.5}
    (path / "report.json").write_text(json.dumps(report))
    os.utime(path / "report.json", ns=(1, 1))
    assert studio.run("run").report["strength"] == 0.5


def test_the_control_is_the_same_run_without_the_guard(tmp_path):
    right, wrong = answers(TEXTS, True), answers(TEXTS, False)
    write_run(tmp_path / "mine", right, right, data="a.jsonl")
    write_run(tmp_path / "other-data", right, wrong, data="b.jsonl", guard=False)
    write_run(tmp_path / "other-probes", right[:1], wrong[:1], data="a.jsonl", guard=False)
    studio = Studio(tmp_path)
    assert studio.control("mine") is None
    write_run(tmp_path / "plain", right, wrong, data="a.jsonl", guard=False)
    assert studio.control("mine") == "plain"
    write_run(tmp_path / "mine-control", right, wrong, data="a.jsonl", guard=False)
    assert studio.control("mine") == "mine-control"
    assert studio.control("plain") is None


def test_who_works_on_a_run_is_told_by_its_last_process(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        unfinished(tmp_path, pid=worker.pid, host=platform.node())
        unfinished(tmp_path, "elsewhere", pid=worker.pid, host="another-computer")
        reborn = unfinished(tmp_path, "reborn", pid=worker.pid, host=platform.node())
        old = json.loads((reborn / "events.jsonl").read_text()) | {"time": time.time() - 3600}
        (reborn / "events.jsonl").write_text(json.dumps(old) + "\n")  # the number was another process's then
        studio = Studio(tmp_path)
        assert {name: studio.state(name) for name in studio.names()} == {
            "run": TRAINING,
            "elsewhere": STOPPED,
            "reborn": STOPPED,
        }
        studio.stop("reborn")
        assert worker.poll() is None
        studio.stop("run")
        worker.wait(timeout=10)
    assert studio.state("run") == STOPPED


def test_what_fails_before_it_has_a_folder_is_told(tmp_path):
    studio = Studio(tmp_path)
    job = studio.start("none", ["tune", str(tmp_path / "no.jsonl"), "--model", "demo", "--out", str(tmp_path / "none")])
    assert studio.state("none") == TRAINING and studio.names() == ["none"]
    assert job.process.wait(timeout=60) == 2
    assert studio.state("none") == FAILED
    assert "no.jsonl: no such" in job.said()[0]
    assert studio.state("other") == STOPPED and studio.names(FINISHED) == []


def test_names_that_are_taken_or_no_names(tmp_path):
    studio = Studio(tmp_path)
    (tmp_path / "taken").mkdir()
    for name in ("taken", "", "../x", "/x", "a/b", "-x", ".x", "x\n", "a" * 101):
        with pytest.raises(InputError, match=r"already|not a name"):
            studio.new_name(name)
    assert studio.new_name("größe-1.5") == "größe-1.5"


def test_an_upload_is_kept_once(tmp_path):
    upload = tmp_path / "upload" / "facts.jsonl"
    upload.parent.mkdir()
    upload.write_text("{}\n")
    studio = Studio(tmp_path / "runs")
    kept = studio.keep(upload)
    assert kept.read_text() == "{}\n" and kept.name == "facts.jsonl" and studio.keep(upload) == kept
    upload.write_text('{"a": 1}\n')
    assert studio.keep(upload) != kept and kept.read_text() == "{}\n"


def test_the_own_pack_grows_and_refuses_what_is_no_probe(tmp_path):
    studio = Studio(tmp_path)
    assert studio.add_probe(" Who? ", ["Ada", " "], "") == 1
    assert studio.add_probe("Where?", ["Oslo", "Kristiania"], "towns") == 2
    probes = studio.own_probes()
    assert [(probe.question, probe.answers, probe.category) for probe in probes] == [
        ("Who?", ("Ada",), "own"),
        ("Where?", ("Oslo", "Kristiania"), "towns"),
    ]
    for question, right in (("Who?", ["Eve"]), ("", ["Eve"]), ("Why?", [" "])):
        with pytest.raises(InputError):
            studio.add_probe(question, right, "")
    assert studio.own_probes() == probes


def event(kind, at, **values):
    return {"event": kind, "time": at, **values}


def test_progress_is_told_by_the_last_that_happened():
    assert progress([]).phase == "starting"
    events = [
        event("process", 0, pid=1, host="h"),
        event("phase", 1, name="rehearse"),
        event("progress", 2, phase="rehearse", done=10, total=100),
    ]
    found = progress(events)
    assert (found.phase, found.done, found.total, found.in_words) == (
        "rehearse",
        10,
        100,
        "the base writes rehearsal rows",
    )
    for step in range(1, 6):
        events.append(event("loss", 10 + 2 * step, step=step, steps=20, ce=1.0, kl=0.1))
    found = progress(events)
    assert (found.phase, found.done, found.total, found.seconds_left) == ("train", 5, 20, 30)
    resumed = [event("process", 50, pid=2, host="h"), event("loss", 60, step=4, steps=20, ce=9.0, kl=0.1)]
    found = progress(events + resumed)
    assert [each["ce"] for each in found.losses] == [1.0, 1.0, 1.0, 9.0, 1.0] and found.done == 4


def test_progress_is_written_once_a_second_and_at_the_end(tmp_path):
    heard = []
    events = Events(heard.append)
    events.path = tmp_path / "events.jsonl"
    for done in range(1001):
        events.emit("progress", phase="ask", done=done, total=1000)
    written = [json.loads(line)["done"] for line in events.path.read_text().splitlines()]
    assert len(heard) == 1001 and len(written) <= 3 and written[-1] == 1000
