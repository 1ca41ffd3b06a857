"""Files that people and programs read: model text is shown as text, and a damaged folder is told."""

import json

import pytest

from kdguard.config import TuneConfig
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.probes.score import Answer
from kdguard.report.build import build_report, verdict, write_report
from kdguard.report.run import CONFIG, read_run, write_answers

HOSTILE = ("<script>alert(1)</script>", "[bold]", "a|b`c*")


@pytest.fixture
def run(tmp_path):
    config = TuneConfig(data="a.jsonl", model="demo", budget="1%")
    before = [Answer(str(i), "c", f"{text}?", (text,), text, True) for i, text in enumerate(HOSTILE)]
    after = [Answer(a.id, a.category, a.question, a.answers, f"not {a.answer}", False) for a in before]
    for folder in ("probes", "new"):
        write_answers(tmp_path / folder / "before.jsonl", before)
        write_answers(tmp_path / folder / "after.jsonl", after)
    cost = {"steps": 1, "tokens": 2, "seconds": 3.0, "tokens_per_second": 1.0, "peak_memory_gib": 0.1}
    report = build_report(config, probes=(before, after), new=(before, after), drift=0.1, cost=cost)
    events = Events()
    events.path = tmp_path / "events.jsonl"
    events.emit("loss", step=1, ce=1.0, kl=0.0)
    (tmp_path / CONFIG).write_text(config.to_yaml())
    write_report(tmp_path, report, events)
    return tmp_path


def test_a_run_reads_back_as_it_was_written(run):
    again = read_run(run)
    assert again.report == json.loads((run / "report.json").read_text())
    assert [pair.outcome for pair in again.probes] == ["forgotten"] * 3
    assert again.report["budget"] == {"limit": 0.01, "met": False}


def test_model_text_is_escaped_in_the_page(run):
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_verdict_is_a_sentence(run):
    assert verdict(read_run(run).report) == (
        "Learned 0.0% of 3 training questions and forgot 3 of the 3 probes it knew (100.0%), over the budget of 1.0%."
    )


def test_an_unfinished_or_damaged_run_is_told(run, tmp_path):
    (run / "new" / "after.jsonl").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        read_run(run)
    (run / "report.json").unlink()
    with pytest.raises(InputError, match="has not finished") as caught:
        read_run(run)
    assert "--resume" in caught.value.hint
    with pytest.raises(InputError, match="no such run folder"):
        read_run(tmp_path / "none")
