"""What the tabs have in common: templates in which all text is escaped, errors as one line, time in words."""

import functools
import inspect
import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from kdguard.errors import KdguardError
from kdguard.report.render import render

TEMPLATES = Path(__file__).parent / "templates"
GPU = {"concurrency_limit": 1, "concurrency_id": "gpu"}  # one at a time, of all that loads a model
_loading = threading.Lock()
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def fill(template: str, **values: Any) -> str:
    """A template of the page."""
    return f'<div class="kd">{render(template, TEMPLATES, **values)}</div>'


html = functools.partial(gr.HTML, js_on_load=None, apply_default_css=False)


def told(function: Callable[..., Any], *, as_text: bool = False) -> Callable[..., Any]:
    """The same function, whose errors say what went wrong and the next thing to do: on the page, or for programs.

    Whatever nobody foresaw is told in a line as well, and in full in the terminal.
    """

    def shown(error: Exception) -> Exception:
        ours = isinstance(error, KdguardError)
        if isinstance(error, gr.Error):
            return error
        if type(error).__name__ == "OutOfMemoryError":
            lines = ["the GPU ran out of memory", "stop what else uses it, or ask a smaller model"]
        elif ours:
            lines = [error.message, *([error.hint] if error.hint else [])]
        else:
            lines = [f"{type(error).__name__}: {error}", "the terminal of kdguard ui shows where"]
        text = "; ".join(lines) if as_text else "<br>".join(map(escape, lines))
        return gr.Error(text, print_exception=not ours)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                raise shown(error) from (None if isinstance(error, KdguardError) else error)

        return generator

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise shown(error) from (None if isinstance(error, KdguardError) else error)

    return plain


def libraries() -> None:
    """Load torch and transformers, the first time: two threads that did it at once would each find a half."""
    with _loading:
        import kdguard.fit
        import kdguard.show
        import kdguard.ui.asking  # noqa: F401


def data_names(config: dict[str, Any]) -> str:
    """The files that a run was trained on, without their folders."""
    data = config.get("data") or []
    return ", ".join(Path(str(each)).name for each in ([data] if isinstance(data, str) else data))


def duration(seconds: float | None) -> str:
    """Seconds in words, as exact as a guess deserves."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
