"""Files that people and programs read: model text is shown as text, and a damaged folder is told."""

import json

import pytest

from kdguard.config import TuneConfig
from kdguard.errors import InputError
from kdguard.events import Events
from kdguard.probes.score import Answer
from kdguard.probes.watch import Allowance, Settled
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
    settled = Settled(Allowance(0.01, 300), 1.0, 0, "the end of training was within it")
    report = build_report(config, probes=(before, after), new=(before, after), drift=0.1, cost=cost, settled=settled)
    events = Events()
    events.path = tmp_path / "events.jsonl"
    events.emit("loss", step=1, steps=1, ce=1.0, kl=0.0)
    (tmp_path / CONFIG).write_text(config.to_yaml())
    write_report(tmp_path, report, events)
    return tmp_path


def test_a_run_reads_back_as_it_was_written(run):
    again = read_run(run)
    assert again.report == json.loads((run / "report.json").read_text())
    assert [pair.outcome for pair in again.probes] == ["forgotten"] * 3
    budget = again.report["budget"]
    assert (budget["limit"], budget["met"], budget["watched"], budget["allowed"]) == (0.01, False, 300, 1)
    assert "by chance" in budget["reason"]


def test_model_text_is_escaped_in_the_page(run):
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_verdict_is_a_sentence(run):
    assert verdict(read_run(run).report) == (
        "Learned 0.0% of 3 training questions and forgot 3 of the 3 probes it knew (100.0%), over the budget of 1.00%: "
        "the watched probes kept it and the scored ones did not: one in five such runs ends so by chance."
    )


def test_a_budget_of_an_older_report_is_told_too(run):
    report = read_run(run).report
    report["budget"] = {"limit": 0.01, "met": True}
    assert verdict(report).endswith("within the budget of 1.00%.")
    write_report(run, report, Events())


def test_plots_stand_in_the_page_in_its_own_colours(run):
    events = Events()
    events.path = run / "events.jsonl"
    for step in (1, 2):
        events.emit("watched", step=step, known=10, forgotten=step, weight=12.0, next_weight=24.0)
    points = [{"strength": s, "learned": s, "forgetting": None if s else 0.0} for s in (0.0, 0.5, 1.0)]
    (run / "dial.json").write_text(json.dumps(points))
    write_report(run, read_run(run).report, Events())
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 3 and "strength of the adapter" in page
    assert "#010101" not in page and "var(--mark)" in page
    assert "http" not in page.replace("http-equiv", "")


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
