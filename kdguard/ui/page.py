"""`kdguard ui RUN`: the probes with both answers side by side, and one box that asks base and tuned."""

import os
import threading
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from kdguard.errors import InputError
from kdguard.report.build import verdict
from kdguard.report.run import ADAPTER, Run

MARKS = {"forgotten": "✗", "gained": "+", "kept": "✓", "missed": "·"}
HEADERS = ["", "question", "right answer", "base", "tuned"]
CSS = """
.gradio-container { max-width: 72rem !important; margin: 0 auto !important; }
footer { display: none !important; }
.gradio-container table * { font-family: var(--font) !important; }
"""


class Asker:
    """The run's model, loaded at the first question; base and tuned answer from the one copy."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._loaded: tuple[Any, Any] | None = None
        self._lock = threading.Lock()

    def ask(self, question: str) -> tuple[str, str]:
        """The base's and the tuned model's greedy answers."""
        if not question.strip():
            raise gr.Error("Type a question first.", print_exception=False)
        from kdguard.model.load import base_view
        from kdguard.probes.answer import ask
        from kdguard.probes.packs import Probe

        with self._lock:
            model, renderer = self._load()
            probe = Probe("asked", "", question.strip(), ())
            with base_view(model):
                [base] = ask(model, renderer, [probe], max_new_tokens=256)
            [tuned] = ask(model, renderer, [probe], max_new_tokens=256)
        return base.answer, tuned.answer

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from kdguard.data.tokens import Renderer
            from kdguard.model.load import load_base, load_tuned, own_tokenizer

            config = self.run.config
            adapter = self.run.path / ADAPTER
            base = load_base(
                config["model"], quant=config["quant"], revision=config["revision"], tokenizer=own_tokenizer(adapter)
            )
            self._loaded = load_tuned(base, adapter), Renderer(base.tokenizer)
        return self._loaded


def build(run: Run) -> gr.Blocks:
    """The page of one run. Its endpoints are `/compare` (filter, category, search) and `/ask` (question)."""
    counts = {name: sum(pair.outcome == name for pair in run.probes) for name in MARKS}
    categories = sorted({pair.before.category for pair in run.probes})
    asker = Asker(run)

    def compare(outcome: str, category: str, search: str) -> list[list[str]]:
        words = search.casefold().split()
        rows = []
        for pair in run.probes:
            before, after = pair.before, pair.after
            row = [MARKS[pair.outcome], before.question, before.answers[0], before.answer, after.answer]
            if outcome not in ("all", pair.outcome) or category not in ("all", before.category):
                continue
            if all(word in " ".join(row).casefold() for word in words):
                rows.append(row)
        return rows or [["", "No probe matches.", "", "", ""]]

    first = "forgotten" if counts["forgotten"] else "kept"
    with gr.Blocks(title=f"kdguard: {run.path.name}", analytics_enabled=False) as page:
        gr.HTML(
            f"<h1 style='font-size:1.5rem;font-weight:600;margin:0'>{escape(verdict(run.report))}</h1>"
            "<p style='opacity:.7;margin:.25rem 0 0'>"
            f"{escape(run.report['model'])} tuned on {escape(run.report['data'] or run.report['adopted'])}</p>"
        )
        with gr.Row():
            labels = [(f"{mark} {name} ({counts[name]:,})", name) for name, mark in MARKS.items()]
            outcome = gr.Radio([*labels, (f"all ({len(run.probes):,})", "all")], value=first, label="Show", scale=3)
            category = gr.Dropdown(["all", *categories], value="all", label="Category", scale=1)
            search = gr.Textbox(label="Search", placeholder="a word in question or answer", scale=2)
        table = gr.Dataframe(
            value=compare(first, "all", ""),
            headers=HEADERS,
            datatype="str",
            type="array",
            interactive=False,
            wrap=True,
            max_height=480,
            show_label=False,
            column_widths=["6%", "37%", "19%", "19%", "19%"],
        )
        inputs = [outcome, category, search]
        outcome.change(compare, inputs, table, api_name="compare", show_progress="hidden")
        for changed in (category.change, search.input):
            changed(
                compare, inputs, table, api_visibility="private", show_progress="hidden", trigger_mode="always_last"
            )
        with gr.Group():
            with gr.Row(equal_height=True):
                question = gr.Textbox(label="Ask both", placeholder="What is the capital of France?", scale=5, lines=1)
                button = gr.Button("Ask", variant="primary", scale=1, min_width=96)
            with gr.Row():
                base = gr.Textbox(label="base", interactive=False, lines=2)
                tuned = gr.Textbox(label="tuned", interactive=False, lines=2)
        for name, event in (("ask", button.click), (None, question.submit)):
            event(
                asker.ask,
                question,
                [base, tuned],
                api_name=name,
                api_visibility="public" if name else "private",
                concurrency_limit=1,
                concurrency_id="model",
            )
    return page


def serve(run: Run, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C; `ready` is called with its address.

    Raises InputError when the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build(run)
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            css=CSS,
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
        )
    except OSError:
        raise InputError(f"port {port} is taken", f"kdguard ui {run.path} --port {port + 1}") from None
    ready(address)
    page.block_thread()
