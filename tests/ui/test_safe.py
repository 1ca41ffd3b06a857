"""The page called by programs, and by people who mean it no good: by name, refused or served in turn."""

import json
import re
import shutil
import threading
import time
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from kdguard.report.run import read_run
from kdguard.ui.studio import PACK
from tests.test_cli import DATA, kdguard
from tests.ui.conftest import serving


@pytest.fixture(scope="module")
def client(server) -> Client:
    return Client(server.address, verbose=False)


def test_compare_by_name(client, runs):
    run = read_run(runs / "guarded")
    for outcome in ("kept", "forgotten", "all"):
        found = client.predict(outcome, api_name="/compare")
        expected = [pair for pair in run.probes if outcome in ("all", pair.outcome)]
        assert (found["run"], len(found["data"])) == ("guarded", len(expected))
    one = run.probes[0]
    found = client.predict("all", one.before.category, one.before.question, "plain", api_name="/compare")
    assert found["run"] == "plain"
    assert found["headers"] == ["outcome", "category", "question", "right answer", "base", "tuned"]
    assert [row[2] for row in found["data"]] == [one.before.question]


def test_ask_by_name_answers_as_the_run_did(client, runs):
    changed = next(pair for pair in read_run(runs / "plain").probes if pair.outcome == "forgotten")
    both = (changed.before.answer, changed.after.answer)
    assert client.predict(changed.before.question, "plain", api_name="/ask") == both
    assert client.predict(changed.before.question, "plain", 0.0, api_name="/ask") == (both[0], both[0])


def test_two_people_who_ask_at_once_are_answered_in_turn(server, runs):
    pairs = [pair for pair in read_run(runs / "plain").probes if pair.outcome == "forgotten"][:6]
    said: dict[int, object] = {}

    def ask(i: int) -> None:
        person = Client(server.address, verbose=False)
        said[i] = person.predict(pairs[i].before.question, "plain" if i % 2 else "guarded", api_name="/ask")

    people = [threading.Thread(target=ask, args=(i,)) for i in range(len(pairs))]
    for person in people:
        person.start()
    for person in people:
        person.join(timeout=120)
    guarded = {pair.before.id: pair.after.answer for pair in read_run(runs / "guarded").probes}
    for i, pair in enumerate(pairs):
        tuned = pair.after.answer if i % 2 else guarded[pair.before.id]
        assert said[i] == (pair.before.answer, tuned)


def test_tune_by_name_is_watched_and_stopped(client, runs):
    started = client.predict(
        handle_file(runs.parent / "facts.jsonl"),
        "by-name",
        model="demo",
        epochs="40",
        probes=["your own"],
        api_name="/tune",
    )
    assert started["run"] == "by-name"
    assert re.fullmatch(r"kdguard tune \S+facts.jsonl --preset demo .*--epochs 40.*", started["command"])
    with pytest.raises(AppError, match="is being trained"):
        client.predict(handle_file(DATA), "another", model="demo", api_name="/tune")
    with pytest.raises(AppError, match="is being trained"):
        client.predict("Who?", api_name="/ask")
    until = time.time() + 120
    while (at := client.predict("by-name", api_name="/progress"))["phase"] != "train" or at["done"] < 2:
        assert time.time() < until and at["state"] == "training", at
        time.sleep(0.5)
    assert at["total"] == 120 and at["ce"] > 0 and at["seconds_left"] > 0
    client.predict("by-name", api_name="/stop")
    while (at := client.predict("by-name", api_name="/progress"))["state"] == "training":
        assert time.time() < until
        time.sleep(0.5)
    assert at["state"] == "stopped" and list((runs / "by-name" / "checkpoints").glob("checkpoint-*"))
    shutil.rmtree(runs / "by-name")


def test_a_training_outlives_the_page_and_is_found_by_the_next(runs):
    with serving(runs) as server:
        person = Client(server.address, verbose=False)
        data = handle_file(runs.parent / "facts.jsonl")
        person.predict(data, "outlives", model="demo", epochs="40", probes=["your own"], api_name="/tune")
        until = time.time() + 120
        while person.predict("outlives", api_name="/progress")["phase"] == "starting":
            assert time.time() < until
            time.sleep(0.5)
    with serving(runs) as server:
        person = Client(server.address, verbose=False)
        assert person.predict("outlives", api_name="/progress")["state"] == "training"
        person.predict("outlives", api_name="/stop")
        while person.predict("outlives", api_name="/progress")["state"] == "training":
            assert time.time() < until
            time.sleep(0.5)
    shutil.rmtree(runs / "outlives")


def test_a_training_that_fails_says_why(client, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "Who?", "answer": "Ada"}\n{"question": "Who?"}\n')
    client.predict(handle_file(broken), "broken", model="demo", api_name="/tune")
    until = time.time() + 60
    while (at := client.predict("broken", api_name="/progress"))["state"] == "training":
        assert time.time() < until
        time.sleep(0.5)
    assert at["state"] == "failed"


@pytest.mark.parametrize("flag", ["--model=demo", "a b", "../up", "/tmp/x", "", ".hidden", "x" * 200, "a/b"])
def test_a_run_is_only_ever_a_name(client, runs, flag):
    before = sorted(runs.iterdir())
    if flag:
        with pytest.raises(AppError, match="not a name for a run"):
            client.predict(handle_file(DATA), flag, model="demo", api_name="/tune")
    for name in ("/compare", "/ask", "/progress", "/stop"):
        arguments = {"/compare": ("all", "all", "", flag or ".."), "/ask": ("Who?", flag or "..")}
        with pytest.raises(AppError, match="there is no such run here"):
            client.predict(*arguments.get(name, (flag or "..",)), api_name=name)
    assert [path for path in runs.iterdir() if path not in before and path.name != "uploads"] == []


def test_a_model_is_never_a_path(client, runs):
    for model in ("/etc", "..", "tests/ui", str(runs / "guarded")):
        with pytest.raises(AppError, match="neither a preset nor a model of the hub"):
            client.predict(handle_file(DATA), "path", model=model, api_name="/tune")
    with pytest.raises(AppError, match="not in the list of choices"):
        client.predict(handle_file(DATA), "path", model="demo", probes=["/etc/passwd"], api_name="/tune")


def test_no_file_is_served_but_what_the_page_made(server, runs):
    for path in (
        "/etc/passwd",
        runs / "guarded" / "report.json",
        runs / PACK,
        "kdguard/ui/page.py",
        "../../etc/passwd",
    ):
        for route in ("gradio_api/file=", "file=", "gradio_api/download/", "static/"):
            found = httpx.get(f"{server.address}{route}{path}")
            assert found.status_code in (400, 403, 404, 405), (route, path)


def test_an_upload_of_the_clients_choosing_is_refused(server, runs):
    """A file that was never uploaded cannot be named as if it had been."""
    stolen = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    config = httpx.get(f"{server.address}config").json()
    files = {part["id"] for part in config["components"] if part["type"] == "file"}
    takers = [each for each in config["dependencies"] if files & set(each["inputs"])]
    assert len(takers) >= 4
    for number, each in enumerate(takers):
        data = [stolen if part in files else None for part in each["inputs"]]
        session = f"thief{number}"
        asked = {"data": data, "fn_index": each["id"], "session_hash": session}
        assert httpx.post(f"{server.address}gradio_api/queue/join", json=asked).status_code == 200
        with httpx.stream("GET", f"{server.address}gradio_api/queue/data?session_hash={session}", timeout=60) as said:
            text = next(line for line in said.iter_lines() if "process_completed" in line)
        assert json.loads(text.removeprefix("data:"))["success"] is False and "root:" not in text
    assert not list(runs.rglob("passwd"))


def test_what_leads_out_of_the_folder_is_not_opened(tmp_path, runs):
    secret = tmp_path / "secret"
    shutil.copytree(runs / "hostile", secret)
    folder = tmp_path / "runs"
    shutil.copytree(runs / "hostile", folder / "inside")
    (folder / "inside" / "report.html").unlink()
    (folder / "inside" / "report.html").symlink_to("/etc/passwd")
    (folder / "outside").symlink_to(secret)
    shutil.copytree(runs / "hostile", folder / "whole")
    with serving(folder) as server:
        person = Client(server.address, verbose=False)
        assert person.predict("all", run="whole", api_name="/compare")["run"] == "whole"
        with pytest.raises(AppError, match=r"report\.html leads out of"):
            person.predict("all", run="inside", api_name="/compare")
        with pytest.raises(AppError, match="there is no such run here"):
            person.predict("all", run="outside", api_name="/compare")


def test_a_gigabyte_is_refused_and_leaves_nothing(server):
    limit, sent = 2**30, 0
    boundary = "b"

    def body():
        nonlocal sent
        yield f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="big.jsonl"\r\n\r\n'.encode()
        while sent < limit:
            sent += 2**20
            yield b"x" * 2**20
        yield f"\r\n--{boundary}--\r\n".encode()

    kept = Path(f"/proc/{server.process.pid}/environ").exists() and uploads_of(server.process.pid)
    try:
        found = httpx.post(
            f"{server.address}gradio_api/upload",
            content=body(),
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
            timeout=120,
        )
        assert found.status_code == 413
    except httpx.TransportError:  # it hung up on us
        assert sent < limit
    assert Client(server.address, verbose=False).predict("all", api_name="/compare")["data"]
    if kept:
        assert sum(file.stat().st_size for file in kept.rglob("*") if file.is_file()) < 300 * 2**20


def uploads_of(pid: int) -> Path:
    """Where the server keeps uploads: the folder that it has made for itself."""
    import tempfile

    return max(Path(tempfile.gettempdir()).glob("kdguard-ui-*"), key=lambda path: path.stat().st_mtime)


def test_only_this_computer_is_answered(server):
    assert httpx.get(server.address).status_code == 200
    assert httpx.get(server.address, headers={"Host": "evil.example"}).status_code == 400
    upload = {"url": f"{server.address}gradio_api/upload", "files": {"files": b"x"}}
    assert httpx.post(**upload, headers={"Origin": "http://evil.example"}).status_code == 403
    assert httpx.post(**upload, headers={"Origin": server.address.rstrip("/")}).status_code == 200
    assert httpx.post(f"{server.address}gradio_api/run/tune", json={"data": []}).status_code == 404
    for route in ("runs", "gradio_api/run-history/connect"):
        assert httpx.post(f"{server.address}{route}", json={}).status_code in (403, 404, 405)
    listening = Path("/proc/net/tcp").read_text() if Path("/proc/net/tcp").exists() else ""
    if listening:
        port = f"{server.port:04X}"
        where = {
            line.split()[1].split(":")[0]
            for line in listening.splitlines()
            if f":{port} " in line.split("00000000:")[0]
        }
        assert where == {"0100007F"}


def test_a_wider_address_has_a_password(runs):
    with serving(runs, "--host", "0.0.0.0") as server:
        secret = re.search(r"user kdguard, password (\S+)", server.said)[1]
        assert len(secret) >= 16
        assert httpx.post(f"{server.address}gradio_api/call/compare", json={"data": []}).status_code == 401
        config = httpx.get(f"{server.address}config")
        assert config.status_code == 401
        person = Client(server.address, auth=("kdguard", secret), verbose=False)
        assert person.predict("all", run="guarded", api_name="/compare")["data"]
        with pytest.raises((ValueError, AppError, httpx.HTTPError)):
            Client(server.address, auth=("kdguard", "guess"), verbose=False)


def test_a_port_that_is_taken_and_a_folder_that_is_not_there(server, runs, tmp_path):
    done = kdguard("ui", runs, "--port", server.port)
    assert done.returncode == 2 and f"port {server.port} is taken" in done.stderr
    done = kdguard("ui", tmp_path / "none")
    assert done.returncode == 2 and "no such folder" in done.stderr


def test_an_empty_folder_is_a_page_too(tmp_path):
    (tmp_path / "runs").mkdir()
    with serving(tmp_path / "runs") as server:
        person = Client(server.address, verbose=False)
        with pytest.raises(AppError, match="there is no such run here"):
            person.predict(api_name="/compare")
