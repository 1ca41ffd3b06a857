"""The page, served and called by name as programs do."""

import socket

import pytest
from gradio_client import Client

from kdguard.report.run import read_run
from kdguard.ui.page import build
from tests.test_cli import DATA, kdguard


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    data = folder / "facts.jsonl"
    data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:40]))
    done = kdguard("tune", data, "--model", "demo", "--no-guard", "--epochs", 3, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    run = read_run(folder / "run")
    blocks = build(run)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    yield run, Client(url, verbose=False)
    blocks.close()


def test_compare_filters_by_outcome_category_and_words(page):
    run, client = page
    for outcome in ("forgotten", "kept", "all"):
        rows = client.predict(outcome, "all", "", api_name="/compare")["data"]
        expected = [pair for pair in run.probes if outcome in ("all", pair.outcome)]
        assert len(rows) == len(expected)
    rows = client.predict("all", "capitals", "france", api_name="/compare")["data"]
    assert [row[2] for row in rows] == ["What is the capital of France?"]


def test_ask_answers_from_base_and_tuned(page):
    run, client = page
    changed = next(pair for pair in run.probes if pair.before.answer != pair.after.answer)
    assert client.predict(changed.before.question, api_name="/ask") == (changed.before.answer, changed.after.answer)
