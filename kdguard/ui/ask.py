"""The Ask tab: one question to the base and the tuned model at once, at any strength of the adapter."""

import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from kdguard.errors import KdguardError
from kdguard.report.run import base_of
from kdguard.report.words import parts
from kdguard.ui.pack import PACK, add_probe
from kdguard.ui.parts import GPU, QUIET, fill, html, libraries, told
from kdguard.ui.studio import Studio

if TYPE_CHECKING:
    from kdguard.probes.score import Answer
    from kdguard.ui.asking import Asker

NOBODY = "none"
_PAUSE = 0.1  # seconds between two pictures of the growing answers


@functools.cache
def asker() -> "Asker":
    """The one that holds the model; torch is loaded with the first question."""
    libraries()
    from kdguard.ui.asking import Asker

    return Asker()


def let_go() -> None:
    """Free the memory of the model, if one is loaded."""
    if asker.cache_info().currsize:
        asker().release()


def answers(
    studio: Studio, question: str, run: str, other: str | None, strength: float | None
) -> Iterator[list["Answer"]]:
    """Those of the base, of the run at that strength (as it was written, if None), and of another run, as they grow."""
    if not question.strip():
        raise KdguardError("there is no question", "type one first")
    studio.refuse_busy()
    runs = [studio.run(name) for name in (run, other) if name]
    libraries()
    from kdguard.ui.asking import Voice

    strengths = [
        runs[0].report["strength"] if strength is None else strength,
        *(r.report["strength"] for r in runs[1:]),
    ]
    voices = [Voice(each, at) for each, at in zip(runs, strengths, strict=True)]
    yield from asker().ask(question.strip(), voices)


def tab(studio: Studio, opened: str | None, here: gr.Tab) -> None:
    """Build it, in the tab `here`. `opened` is the run that it asks first."""

    def others(run: str | None) -> list[str]:
        """The other runs of the same base."""
        if not run:
            return []
        mine = base_of(studio.run(run))
        model = studio.reports()[run]["model"]
        alike = [name for name, report in studio.reports().items() if name != run and report["model"] == model]
        return [name for name in alike if base_of(studio.run(name)) == mine]

    def show(run: str | None) -> tuple[Any, ...]:
        names = list(studio.reports())
        run = next((name for name in (run, opened) if name in names), next(iter(names), None))
        at = studio.reports()[run]["strength"] if run else 1.0
        empty = "" if run else fill("nothing.html", folder=studio.root)
        return (
            gr.Dropdown(names, value=run),
            gr.Dropdown([NOBODY, *others(run)], value=NOBODY),
            at,
            empty,
            gr.HTML(visible=bool(run)),
        )

    def cards(names: list[str], found: list["Answer"], whole: bool, asking: bool) -> str:
        base = found[0]
        sides = []
        for i, (name, answer) in enumerate(zip(names, found, strict=True)):
            beside = found[1] if i == 0 else base
            sides.append({"name": name, "text": answer.answer, "parts": parts(answer, beside) if whole else []})
        return fill("spoken.html", sides=sides, asking=asking)

    def ask(question: str, run: str | None, other: str, strength: float) -> Iterator[tuple[Any, ...]]:
        if not run:
            raise KdguardError("there is no finished run to ask", "tune one first")
        other = other if other in others(run) else ""
        names = ["base", f"{run} at strength {strength:g}", *([other] if other else [])]
        from kdguard.probes.score import Answer

        found = [Answer("asked", "", question, (), "", False)] * len(names)
        yield cards(names, found, False, True), gr.skip(), gr.skip(), gr.update(interactive=True)
        drawn = 0.0
        try:
            for found in answers(studio, question, run, other, strength):
                if time.monotonic() - drawn > _PAUSE:
                    drawn = time.monotonic()
                    yield cards(names, found, False, True), gr.skip(), gr.skip(), gr.skip()
        except Exception:
            yield "", gr.skip(), gr.skip(), gr.update(interactive=False)
            raise
        yield cards(names, found, True, False), found[0].answer, question, gr.update(interactive=False)

    def remember(question: str, right: str, category: str) -> tuple[Any, ...]:
        n = add_probe(studio.root / PACK, question, right.split("|"), category)
        gr.Info(f"Your pack holds {n:,} probes now; the Tune tab can ask it.")
        return "", ""

    def ask_both(question: str, run: str = "", strength: float | None = None) -> tuple[str, str]:
        """The greedy answers of the base and of a run: by its name, or the one the page opened with; at a strength from
        0 to 1, or as it was written."""
        name = run or opened or next(iter(studio.reports()), "")
        if strength is not None and not 0 <= strength <= 1:
            raise KdguardError(f"strength {strength}: not from 0 to 1", "0 is the base, 1 the adapter as trained")
        base, tuned = list(answers(studio, question, name, None, strength))[-1]
        return base.answer, tuned.answer

    gr.api(told(ask_both, as_text=True), api_name="ask", **GPU)

    with gr.Row():
        run = gr.Dropdown([], label="Run", value=None, scale=2, min_width=240, elem_id="ask-run")
        other = gr.Dropdown([NOBODY], value=NOBODY, label="Another run", scale=2, min_width=240, elem_id="ask-other")
        strength = gr.Slider(0, 1, 1.0, step=0.05, label="Strength", scale=2, min_width=240, elem_id="strength")
    with gr.Row(elem_id="question-row"):
        question = gr.Textbox(
            label="Question",
            placeholder="What is the capital of France?",
            scale=6,
            lines=1,
            max_lines=6,
            elem_id="question",
        )
        button = gr.Button("Ask", variant="primary", scale=0, min_width=110, elem_id="ask")
        halt = gr.Button("Stop", scale=0, min_width=110, interactive=False, elem_id="halt")
    nothing = html()
    said = html(cards(["base", "tuned"], [_nothing()] * 2, False, False), elem_id="said")
    with gr.Accordion("Make it a probe of your own pack", open=False):
        with gr.Row(elem_id="probe-row"):
            asked = gr.Textbox(label="Question", scale=3, elem_id="probe-question")
            right = gr.Textbox(label="Right answers, with | between them", scale=3, elem_id="probe-answers")
            category = gr.Textbox(label="Category", value="own", scale=1, min_width=100)
            keep = gr.Button("Keep", scale=0, min_width=110, elem_id="keep")
        html(fill("pack.html", pack=studio.root / PACK))

    inputs, outputs = [question, run, other, strength], [said, right, asked, halt]
    quiet = {**QUIET, "show_progress": "minimal", "show_progress_on": said}
    events = [event(told(ask), inputs, outputs, **quiet, **GPU) for event in (button.click, question.submit)]

    def again(question: str, *rest: Any) -> Iterator[tuple[Any, ...]]:
        if question.strip() and rest[0]:
            yield from ask(question, *rest)

    turned = [strength.input, other.input]
    events.append(gr.on(turned, told(again), inputs, outputs, trigger_mode="always_last", **quiet, **GPU))
    keep.click(told(remember), [asked, right, category], [asked, right], **QUIET)
    choices = [run, other, strength, nothing, said]
    here.select(told(show), run, choices, **QUIET)
    events.append(run.input(told(show), run, choices, **QUIET).then(told(again), inputs, outputs, **quiet, **GPU))
    halt.click(lambda: gr.update(interactive=False), None, halt, cancels=events, **QUIET)


def _nothing() -> "Answer":
    from kdguard.probes.score import Answer

    return Answer("", "", "", (), "", False)
