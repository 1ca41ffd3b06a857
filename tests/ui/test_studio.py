"""The folder behind the page: what is there, which is whose control, who works on it, and the person's own probes."""

import json
import os
import platform
import subprocess
import sys
import threading
import time

import pytest

from kdguard.errors import InputError, KdguardError
from kdguard.events import Events
from kdguard.probes.packs import load_probes
from kdguard.ui.pack import PACK, add_probe
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
    assert set(studio.reports()) == {"one", "demo/guarded"}
    assert studio.names(STOPPED) == ["stopped"]


def test_a_damaged_run_hides_no_other(tmp_path):
    write_run(tmp_path / "whole", answers(TEXTS, True), answers(TEXTS, True), data="a.jsonl")
    bad = write_run(tmp_path / "bad", answers(TEXTS, True), answers(TEXTS, True), data="a.jsonl")
    (bad / "report.json").write_text("{")
    (bad / "config.yaml").write_text("[")
    studio = Studio(tmp_path)
    assert set(studio.reports()) == {"whole"} and studio.config("bad") == {}
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
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with stranger, subprocess.Popen([*stranger.args, "kdguard"], stdin=subprocess.PIPE) as worker:
        unfinished(tmp_path, "strange", pid=stranger.pid, host=platform.node())
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
            "strange": STOPPED,
        }
        studio.stop("reborn")
        studio.stop("strange")
        assert worker.poll() is None and stranger.poll() is None
        assert studio.worker("run").pid == worker.pid and not studio.stopping("run")
        studio.stop("run")
        worker.wait(timeout=10)
        stranger.stdin.close()
    assert studio.state("run") == STOPPED


def test_what_fails_before_it_has_a_folder_is_told(tmp_path):
    studio = Studio(tmp_path)
    job = studio.start("none", ["tune", str(tmp_path / "no.jsonl"), "--model", "demo", "--out", str(tmp_path / "none")])
    assert studio.state("none") == TRAINING and studio.names() == ["none"]
    assert job.process.wait(timeout=60) == 2
    assert studio.state("none") == FAILED
    assert "no.jsonl: no such" in job.said()[0] and studio.said("none") == job.said()
    assert studio.names(FINISHED) == []


def test_names_that_are_taken_or_no_names(tmp_path):
    studio = Studio(tmp_path)
    (tmp_path / "taken").mkdir()
    for name in ("taken", "uploads", PACK, "", "../x", "/x", "a/b", "-x", ".x", "x\n", "a" * 101):
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
    again = studio.keep(upload)
    assert again != kept and kept.read_text() == "{}\n"
    (unfinished(tmp_path / "runs") / "config.yaml").write_text(f"data: {again}\n")
    studio.forget(upload)
    assert again.exists()
    (tmp_path / "runs" / "run" / "config.yaml").unlink()
    studio.forget(upload)
    assert not again.exists() and kept.exists()


def test_the_own_pack_grows_and_refuses_what_is_no_probe(tmp_path):
    pack = tmp_path / "runs" / "pack.jsonl"
    assert add_probe(pack, " Who? ", ["Ada", " "], "") == 1
    pack.write_text(pack.read_text().rstrip("\n").replace("{", '{"note": "mine", '))
    assert add_probe(pack, "Where?", ["Oslo", "Kristiania"], "towns") == 2
    probes = load_probes([str(pack)])
    assert [(probe.question, probe.answers, probe.category) for probe in probes] == [
        ("Who?", ("Ada",), "own"),
        ("Where?", ("Oslo", "Kristiania"), "towns"),
    ]
    for question, right in (("Who?", ["Eve"]), ("", ["Eve"]), ("Why?", [" "])):
        with pytest.raises(InputError):
            add_probe(pack, question, right, "")
    assert load_probes([str(pack)]) == probes and '"note": "mine"' in pack.read_text()


def test_a_process_that_was_asked_to_stop_is_not_disturbed_while_it_saves(tmp_path):
    code = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: (print("asked", flush=True), signal.signal(signal.SIGTERM, signal.SIG_DFL)))
print("ready", flush=True)
while True: time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-c", code, "kdguard"], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "ready\n"
        unfinished(tmp_path, pid=worker.pid, host=platform.node())
        studio = Studio(tmp_path)
        studio.stop("run")
        assert worker.stdout.readline() == "asked\n" and studio.stopping("run")
        studio.stop("run")
        time.sleep(0.3)
        assert worker.poll() is None and studio.state("run") == TRAINING
        worker.kill()


def test_only_one_run_is_trained_at_a_time_however_many_ask(tmp_path):
    studio = Studio(tmp_path)
    began, refused = [], []

    def start(name):
        try:
            began.append(studio.start(name, ["tune", "none.jsonl", "--model", "demo", "--out", str(tmp_path / name)]))
        except KdguardError as error:
            refused.append(error.message)

    people = [threading.Thread(target=start, args=(f"run-{i}",)) for i in range(8)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert len(began) == 1 and len(refused) == 7 and "is being trained" in refused[0]
    began[0].process.wait()


def test_a_run_that_goes_on_in_a_terminal_is_seen_though_it_was_begun_here(tmp_path):
    studio = Studio(tmp_path)
    job = studio.start("run", ["--version"])
    job.process.wait()
    with subprocess.Popen([sys.executable, "-c", "input()", "kdguard"], stdin=subprocess.PIPE) as worker:
        unfinished(tmp_path, pid=worker.pid, host=platform.node())
        assert studio.state("run") == TRAINING
        worker.stdin.close()
        worker.wait()
    assert studio.state("run") == STOPPED


@pytest.mark.alone
def test_twenty_runs_are_as_quick_as_one(tmp_path):
    texts = [str(i) for i in range(2000)]
    for i in range(20):
        write_run(
            tmp_path / f"run-{i}", answers(texts, True), answers(texts, True), data=f"{i}.jsonl", guard=i % 2 == 0
        )
    studio = Studio(tmp_path)
    studio.run("run-0")
    studio.control("run-0")
    began = time.perf_counter()
    assert len(studio.reports()) == 20 and studio.control("run-0") is None
    assert time.perf_counter() - began < 0.2


def test_lines_that_are_no_events_hide_nothing(tmp_path):
    path = unfinished(tmp_path)
    events = Events()
    events.path = path / "events.jsonl"
    for torn in ("1\n", "[]\n", '{"event": "x"}\n', '{"event": "lo'):
        with open(events.path, "a") as file:
            file.write(torn)
    events.emit("process", pid=1, host="elsewhere")
    assert [event["event"] for event in Studio(tmp_path).events("run")] == ["process"]


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


def test_the_page_loads_no_torch_before_it_is_needed_and_never_the_trainer():
    code = """
import sys
import kdguard.ui.page
from kdguard.ui.parts import libraries
assert not {"torch", "transformers", "scipy", "matplotlib"} & set(sys.modules)
libraries()
assert "torch" in sys.modules and not {"kdguard.tuning", "kdguard.guard.trainer"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
