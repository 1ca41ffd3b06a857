"""`kdguard ui`: the page of four tabs over a folder of runs, and how it is served."""

import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kdguard.errors import InputError, KdguardError
from kdguard.ui import ask, compare, runs, tune
from kdguard.ui.parts import QUIET, fill, html
from kdguard.ui.studio import Studio

HERE = "127.0.0.1"
USER = "kdguard"
UPLOAD_LIMIT = "256mb"


def build(studio: Studio, opened: str | None = None) -> gr.Blocks:
    """The page. `opened` is the run that it shows first. Its endpoints for programs are `/compare`, `/ask`, `/tune`,
    `/progress` and `/stop`."""
    with gr.Blocks(title=f"kdguard: {studio.root.name}", analytics_enabled=False) as page:
        html(fill("top.html", folder=studio.root))
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            with gr.Tab("Compare", id="compare"):
                show_compare, compared = compare.tab(studio, opened)
            with gr.Tab("Ask", id="ask") as asking:
                ask.tab(studio, opened, asking)
            with gr.Tab("Tune", id="tune") as tuning:
                look, watched = tune.tab(studio, tuning)
            with gr.Tab("Runs", id="runs") as all_runs:
                runs.tab(studio, all_runs)
        page.load(lambda: show_compare(opened), None, compared, **QUIET)
        look.click(lambda name: (gr.Tabs(selected="compare"), *show_compare(name)), watched, [tabs, *compared], **QUIET)
    return page


def serve(
    studio: Studio,
    opened: str | None,
    *,
    port: int,
    host: str = HERE,
    share: bool = False,
    password: str | None = None,
    ready: Callable[[str, str | None], None],
) -> None:
    """Serve the page until Ctrl-C; `ready` is called with its address and the password, if it has one.

    It is for this computer alone unless `host` or `share` says otherwise; then, or where one is given, it has a
    password. Raises InputError when the port is taken.
    """
    alone = host in (HERE, "localhost") and not share
    if not alone or password:
        password = password or secrets.token_urlsafe(12)
    uploads = tempfile.mkdtemp(prefix="kdguard-ui-")  # for no other user's eyes
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": uploads}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the uploads go even then
    page = build(studio, opened).queue(api_open=False)  # nothing goes past the queue
    # A page elsewhere may send a browser here, under a name of its own or from its own pages: neither is answered.
    guards = [Middleware(SameOrigin)]
    if alone:
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=[HERE, "localhost"]))
    try:
        _, address, shared = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=(USER, password) if password else None,
            quiet=True,
            css_paths=Path(__file__).parent / "page.css",
            theme=theme(),
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            max_file_size=UPLOAD_LIMIT,
            app_kwargs={"middleware": guards},
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
        )
        if share and not shared:
            raise KdguardError("no public address could be had from Gradio", "--host 0.0.0.0 for your own network")
        ready(shared if share else address, password)
        page.block_thread()
    except OSError as error:
        if "empty port" in str(error):
            raise InputError(f"port {port} is taken", f"kdguard ui {studio.root} --port {port + 1}") from None
        raise InputError(f"cannot listen on {host} ({error})", "--host 127.0.0.1, or an address of this one") from None
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


class SameOrigin:
    """Refuses what a page of another site makes a browser send."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "GET":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin and urlsplit(origin).netloc != headers.get("host"):
                await PlainTextResponse("another site's request", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def theme() -> Any:
    """Calm, in the colours of the report, with the system's own fonts: nothing is fetched."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_label_background_fill_selected="*primary_100",
        checkbox_label_background_fill_selected_dark="*primary_800",
    )
