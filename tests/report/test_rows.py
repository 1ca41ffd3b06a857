"""The page of `data show` in a real browser: it asks for nothing, runs nothing, says nothing and fits a phone."""

import json
from pathlib import Path

import pytest

from kdguard.config import resolve
from kdguard.show import show, write_page
from tests.report.test_browser import HOSTILE, look


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Hostile text as a question, as an answer, and in the name of the file; and a row that cannot be used."""
    folder = tmp_path_factory.mktemp("rows")
    data = folder / f"{HOSTILE[2]}.jsonl"
    rows = [{"question": f"{text}\u202e\x1b[2J", "answer": f"{text}\tא👋"} for text in HOSTILE]
    rows += [{"question": HOSTILE[0]}, {"question": "line\n" * 100, "answer": "word " * 200}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = resolve({"data": str(data), "model": "demo"})
    shown, spread = show(config, 20)
    assert len(shown) == len(rows) and spread
    write_page(folder / "rows.html", shown, spread, config)
    return folder / "rows.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_quiet_asks_for_nothing_and_fits(browse, page, width, scheme):
    seen, wrong = look(browse, page, width, scheme)
    assert wrong == []
    assert (seen["window"], seen["dark"]) == (width, scheme == "dark")
    assert (seen["scripts"], seen["images"], seen["plots"]) == (0, 0, 0)
    for text in HOSTILE:
        assert seen["text"].count(text) >= 2
    assert "\u202e" not in seen["text"] and "\\u202e\\x1b[2J" in seen["text"]


def test_every_token_says_its_number_and_its_kind(browse, page):
    opened, _ = browse(page.as_uri())
    found = opened.evaluate("[...document.querySelectorAll('.row:nth-of-type(1) bdi span')].map(each => each.title)")
    (row, *_), _ = show(resolve({"data": str(page.with_name(f"{HOSTILE[2]}.jsonl")), "model": "demo"}), 1)
    assert [number for title in found for number in title.split()[:-1]] == [str(token.id) for token in row.tokens]
    assert found[0].endswith(" template") and found[-1].endswith(" target")
