"""The page, served and called by name as programs do."""

import json
import signal
import socket
import subprocess
import sys

import pytest
from gradio_client import Client

from kdguard.report.run import read_run
from kdguard.ui.page import build
from tests.conftest import ROOT
from tests.report.test_build import HOSTILE
from tests.report.test_build import run as hostile  # noqa: F401
from tests.test_cli import DATA, kdguard


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    data = folder / "facts.jsonl"
    data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:40]))
    done = kdguard("tune", data, "--model", "demo", "--no-guard", "--epochs", 3, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kdguard", "ui", str(folder / "run"), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split()[0]
        yield read_run(folder / "run"), Client(address, verbose=False), port
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) in (0, 130)


def test_compare_filters_by_outcome_category_and_words(page):
    run, client, _ = page
    for outcome in ("forgotten", "kept", "all"):
        rows = client.predict(outcome, "all", "", api_name="/compare")["data"]
        expected = [pair for pair in run.probes if outcome in ("all", pair.outcome)]
        assert len(rows) == len(expected)
    rows = client.predict("all", "capitals", "france", api_name="/compare")["data"]
    assert [row[1] for row in rows] == ["What is the capital of France?"]


def test_ask_answers_from_base_and_tuned(page):
    run, client, _ = page
    changed = next(pair for pair in run.probes if pair.before.answer != pair.after.answer)
    assert client.predict(changed.before.question, api_name="/ask") == (changed.before.answer, changed.after.answer)


def test_hostile_text_and_an_adapter_without_its_data_are_shown_as_they_are(hostile):  # noqa: F811
    report = json.loads((hostile / "report.json").read_text())
    adopted = "<script>alert(2)</script>"
    (hostile / "report.json").write_text(json.dumps({**report, "data": None, "adopted": adopted}))
    parts = [part["props"].get("value") for part in build(read_run(hostile)).get_config_file()["components"]]
    header = next(part for part in parts if isinstance(part, str) and part.startswith("<h1"))
    assert "<script" not in header and "&lt;script&gt;alert(2)" in header
    table = next(part for part in parts if isinstance(part, dict) and "headers" in part)
    assert [row[2] for row in table["data"]] == list(HOSTILE)


def test_a_port_that_is_taken_says_so(page):
    run, _, port = page
    done = kdguard("ui", run.path, "--port", port)
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
