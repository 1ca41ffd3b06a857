"""The report in a real browser: it asks for nothing, runs nothing, says nothing and fits a phone, light and dark."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kdguard.config import TuneConfig
from kdguard.events import Events
from kdguard.probes.score import Answer
from kdguard.probes.watch import Allowance, Settled
from kdguard.report.build import build_report, write_report
from kdguard.report.run import CONFIG, write_answers

HOSTILE = (
    "<script>alert(1)</script>",
    "[bold]",
    "<img src=x onerror=alert(1)>",
    "</style></title><script src=http://example.invalid/x.js></script>",
    "unbroken" * 40,
)
MEASURED = """(async () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    return {
        dark: matchMedia("(prefers-color-scheme: dark)").matches,
        window: innerWidth,
        room: document.documentElement.clientWidth,
        width: document.documentElement.scrollWidth,
        scripts: document.scripts.length,
        images: document.images.length,
        plots: document.querySelectorAll("svg").length,
        text: document.title + document.body.textContent,
    };
})()"""


def look(browse, page: Path, width: int, scheme: str) -> tuple[dict, list[str]]:
    """What MEASURED tells of the page, and what is wrong with it."""
    opened, wrong = browse(page.as_uri(), width, scheme)
    seen = opened.evaluate(MEASURED)
    if seen["width"] > seen["room"]:
        wrong.append(f"{seen['width']} px wide in {seen['room']}")
    return seen, wrong


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report with every part that one can have, and hostile text wherever a person or a model puts text."""
    out = tmp_path_factory.mktemp("run")
    config = TuneConfig(data=f"{HOSTILE[2]}.jsonl", model="demo", budget="1%")
    before, after = [], []
    for right in ((True, False), (False, True), (True, True), (False, False)):  # forgotten, gained, kept, missed
        for text in HOSTILE:
            asked = Answer(f"{right} {text}", text, f"{text}?", (text,), text, right[0], "HighlyKnown", ((text, 0.4),))
            before.append(asked)
            after.append(replace(asked, answer=f"not {text}", correct=right[1], tokens=(("not ", 0.9), (text, 0.1))))
    for folder in ("probes", "new"):
        write_answers(out / folder / "before.jsonl", before)
        write_answers(out / folder / "after.jsonl", after)
    events = Events()
    events.path = out / "events.jsonl"
    for step in (1, 2):
        events.emit("loss", step=step, steps=2, ce=1.0 / step, kl=0.1)
        events.emit("watched", step=step, known=10, forgotten=step, weight=12.0, next_weight=24.0)
    (out / "dial.json").write_text(json.dumps([{"strength": s, "learned": s, "forgetting": s / 9} for s in (0.0, 1.0)]))
    (out / CONFIG).write_text(config.to_yaml())
    cost = {"steps": 1, "tokens": 2, "seconds": 3.0, "tokens_per_second": 1.0, "peak_memory_gib": 0.1}
    settled = Settled(Allowance(0.01, 300), 0.5, 7, "no strength of the adapter kept it")
    answers = (before, after)
    write_report(out, build_report(config, probes=answers, new=answers, drift=0.1, cost=cost, settled=settled), events)
    return out / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_quiet_asks_for_nothing_and_fits(browse, report, width, scheme):
    seen, wrong = look(browse, report, width, scheme)
    assert wrong == []
    assert (seen["window"], seen["dark"]) == (width, scheme == "dark")
    assert (seen["scripts"], seen["images"], seen["plots"]) == (0, 0, 3)
    for text in HOSTILE:
        assert text in seen["text"]


@pytest.mark.parametrize("policy", [True, False], ids=["with its policy", "without"])
@pytest.mark.parametrize(
    "mistake",
    [
        '<img src="http://example.invalid/x.png">',
        '<link rel="stylesheet" href="http://example.invalid/x.css">',
        "<img src=x onerror=alert(1)>",
        "<script>console.error('a mistake')</script>",
        "<script>alert(1)</script>",
        "<script>none.such</script>",
        '<p style="width: 500px">wide</p>',
    ],
)
def test_a_mistake_in_the_page_would_be_found(browse, report, mistake, policy):
    page = report.read_text()
    twin = report.with_name("twin.html")
    lines = [line for line in page.split("\n") if policy or "Content-Security-Policy" not in line]
    assert len(lines) == page.count("\n") + policy
    twin.write_text("\n".join(lines).replace("</body>", f"{mistake}</body>"))
    assert look(browse, twin, 400, "light")[1]
