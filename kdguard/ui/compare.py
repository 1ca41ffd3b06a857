"""The Compare tab: what became of old knowledge, question by question."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from kdguard.errors import KdguardError
from kdguard.report.build import verdict
from kdguard.report.figures import OUTCOMES, Pair
from kdguard.report.run import Run, read_explained
from kdguard.report.words import parts
from kdguard.ui.ask import let_go
from kdguard.ui.parts import GPU, QUIET, data_names, fill, html, told
from kdguard.ui.studio import Studio

MARKS = {"forgotten": "✗", "kept": "✓", "gained": "+", "missed": "·"}
HEADERS = ["outcome", "category", "question", "right answer", "base", "tuned"]
EXPLAIN = "Find the training rows that made it forget"
SHOWN = 50  # rows at first; as many more with each click, times four
NEAREST = 5  # training rows of a forgotten probe


def chosen(run: Run, outcome: str, category: str, search: str) -> list[Pair]:
    """The run's probes of one outcome, `changed` or `all`, and category, with every word of `search` in them."""
    words = search.casefold().split()

    def wanted(pair: Pair) -> bool:
        before, after = pair.before, pair.after
        if outcome == "changed":
            if before.answer == after.answer:
                return False
        elif outcome not in ("all", pair.outcome):
            return False
        if category not in ("all", before.category):
            return False
        texts = (before.question, *before.answers, before.answer, after.answer)
        return not words or all(word in " ".join(texts).casefold() for word in words)

    return [pair for pair in run.probes if wanted(pair)]


def table(run: Run, control: Run | None, pairs: Sequence[Pair], shown: int) -> str:
    """The first of them as rows that open."""
    twin = {pair.before.id: pair.after for pair in control.probes} if control else {}
    found = read_explained(run.path)
    nearest = {probe["id"]: probe["rows"] for probe in found["probes"]} if found else {}
    rows = []
    for pair in pairs[:shown]:
        before, after = pair.before, pair.after
        sides = [("base", before, after), ("tuned", after, before)]
        if before.id in twin:
            sides.append(("without the guard", twin[before.id], before))
        rows.append(
            {
                "outcome": pair.outcome,
                "mark": MARKS[pair.outcome],
                "question": before.question,
                "category": before.category,
                "level": before.level,
                "answers": before.answers,
                "right": before.answers[0],
                "base": before.answer,
                "tuned": after.answer,
                "base_right": before.correct,
                "tuned_right": after.correct,
                "sides": [
                    {"name": name, "right": answer.correct, "parts": parts(answer, other)}
                    for name, answer, other in sides
                ],
                "nearest": nearest.get(before.id, ())[:NEAREST],
            }
        )
    if found:
        unexplained = "It was not forgotten yet when kdguard explain looked."
    elif run.config["data"]:
        unexplained = "The button below the list finds the training rows that made it forget."
    else:
        unexplained = "Which training rows made it forget cannot be told: this adapter was adopted without its data."
    return fill("probes.html", rows=rows, total=len(pairs), unexplained=unexplained)


def tab(studio: Studio, opened: str | None) -> tuple[Any, list[Any]]:
    """Build it. Returns the function and its outputs that show a run."""

    def view(name: str | None, outcome: str, category: str, search: str, shown: int = SHOWN) -> tuple[Any, ...]:
        if not name:
            return gr.skip(), gr.skip(), gr.skip()  # a change before the page has its run
        run = studio.run(name)
        pairs = chosen(run, outcome, category, search)
        twin = studio.control(name)
        left = len(pairs) - shown
        more = gr.Button(f"Show {min(left, 4 * SHOWN):,} more", visible=left > 0)
        return table(run, studio.run(twin) if twin else None, pairs, shown), more, shown

    def show(name: str | None) -> tuple[Any, ...]:
        """The run of that name, or the newest, from its beginning."""
        names = studio.reports()
        name = name if name in names else next(iter(names), None)
        if name is None:
            empty = fill("nothing.html", folder=studio.root)
            return gr.Dropdown(visible=False), empty, *[gr.update(visible=False)] * 3, "", *[gr.skip()] * 3
        run = studio.run(name)
        counts = {outcome: sum(pair.outcome == outcome for pair in run.probes) for outcome in OUTCOMES}
        changed = sum(pair.before.answer != pair.after.answer for pair in run.probes)
        labels = [(f"{MARKS[outcome]} {outcome} {counts[outcome]:,}", outcome) for outcome in MARKS]
        labels += [(f"changed {changed:,}", "changed"), (f"all {len(run.probes):,}", "all")]
        first = next((outcome for outcome in ("forgotten", "kept") if counts[outcome]), "all")
        headline = fill(
            "headline.html", report=run.report, verdict=verdict(run.report), flow=counts, data=data_names(run.config)
        )
        categories = ["all", *sorted({pair.before.category for pair in run.probes})]
        explain = counts["forgotten"] and run.config["data"] and not read_explained(run.path)
        return (
            gr.Dropdown(list(names), value=name, visible=True),
            headline,
            gr.Radio(labels, value=first, visible=True),
            gr.Dropdown(categories, value="all", visible=True),
            gr.Textbox("", visible=True),
            *view(name, first, "all", ""),
            gr.Button(visible=bool(explain)),
        )

    def explain(name: str, *filters: Any) -> Iterator[tuple[Any, ...]]:
        """Run `kdguard explain`, and show what it found."""
        studio.refuse_busy()
        let_go()
        yield gr.skip(), gr.skip(), gr.skip(), gr.Button("Comparing questions with training rows …", interactive=False)
        command = [sys.executable, "-m", "kdguard", "explain", str(studio.path(name)), "--json"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        ready = gr.Button(EXPLAIN, interactive=True, visible=done.returncode != 0)
        yield *view(name, *filters), ready
        if done.returncode:
            last = done.stderr.strip().splitlines() or ["it ended without a word"]
            raise KdguardError(last[0].removeprefix("error "), " ".join(last[1:]).strip().removeprefix("try "))

    run = gr.Dropdown([], label="Run", elem_id="compare-run", value=None, visible=False)
    headline = html(elem_id="headline")
    with gr.Row(elem_id="filters"):
        outcome = gr.Radio(["all"], value="all", label="Show", scale=6, min_width=320, elem_id="outcome")
        category = gr.Dropdown(["all"], value="all", label="Category", scale=1, min_width=140)
        search = gr.Textbox(
            label="Search", placeholder="a word", scale=1, min_width=140, visible=False, elem_id="search"
        )
    rows = html(elem_id="probes")
    shown = gr.State(SHOWN)
    more = gr.Button("Show more", visible=False, elem_id="more")
    explained = gr.Button(EXPLAIN, visible=False, elem_id="explain")

    filters = [run, outcome, category, search]
    # One listener for all of them: of several, an earlier answer could come last and stay.
    filtered = [outcome.input, category.input, search.change]
    gr.on(filtered, told(view), filters, [rows, more, shown], trigger_mode="always_last", **QUIET)
    more.click(
        lambda *values: told(view)(*values[:-1], values[-1] + 4 * SHOWN),
        [*filters, shown],
        [rows, more, shown],
        **QUIET,
    )
    explained.click(told(explain), filters, [rows, more, shown, explained], **QUIET, **GPU)
    outputs = [run, headline, outcome, category, search, rows, more, shown, explained]
    run.input(told(show), run, outputs, **QUIET)

    def compare(outcome: str = "forgotten", category: str = "all", search: str = "", run: str = "") -> dict[str, Any]:
        """Old-knowledge probes with both answers: those of one outcome (forgotten, kept, gained, missed, changed, all),
        of one category, with all words of `search`; of a run by its name, or of the one the page opened with."""
        name = run or opened or next(iter(studio.reports()), "")
        found = chosen(studio.run(name), outcome, category, search)
        data = [
            [pair.outcome, each.category, each.question, each.answers[0], each.answer, pair.after.answer]
            for pair in found
            for each in [pair.before]
        ]
        return {"run": name, "verdict": verdict(studio.run(name).report), "headers": HEADERS, "data": data}

    gr.api(told(compare, as_text=True), api_name="compare")
    return told(show), outputs
