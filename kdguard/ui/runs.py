"""The Runs tab: all of them in figures, one as its report, several beside each other, and taking one away."""

import time
import zipfile
from pathlib import Path
from typing import Any

import gradio as gr

from kdguard.errors import InputError
from kdguard.report import run as run_folder
from kdguard.report.compare import compare
from kdguard.ui.command import typed
from kdguard.ui.parts import QUIET, data_names, fill, html, told
from kdguard.ui.studio import FINISHED, Studio

LIMIT = 50  # differing questions shown of several runs


def overview(studio: Studio) -> str:
    """Every run with its figures, and the finished ones as a picture."""
    from kdguard.report.plots import plot_runs

    reports = studio.reports()
    rows = []
    for name in studio.names():
        folder = studio.root / name
        config = studio.config(name) if (folder / run_folder.CONFIG).is_file() else {}
        changed = (folder / run_folder.CONFIG).stat().st_mtime if config else time.time()
        rows.append(
            {
                "name": name,
                "state": studio.state(name),
                "model": Path(str(config.get("model", ""))).name,
                "data": data_names(config),
                "report": reports.get(name),
                "when": time.strftime("%d %b %H:%M", time.localtime(changed)),
            }
        )
    points = [
        (name, report["learned"]["after"], report["kept"]["forgetting"])
        for name, report in reports.items()
        if report["learned"]["n"] and report["kept"]["known"]
    ]
    return fill("runs.html", rows=rows, folder=studio.root, plot=plot_runs(points, width=5) if points else "")


def packed(studio: Studio, name: str) -> Path:
    """The adapter with its model card, the report and the config of a run, in a ZIP file."""
    path = studio.path(name)
    if studio.state(name) != FINISHED:
        raise InputError(f"{name}: this run has not finished", "kdguard tune --resume goes on with it")
    out = studio.scratch / f"{name.replace('/', '-')}.zip"
    files = [path / each for each in (run_folder.REPORT, "report.html", run_folder.CONFIG)]
    files += sorted((path / run_folder.ADAPTER).iterdir())
    with zipfile.ZipFile(out, "w") as archive:
        for file in files:
            archive.write(file, Path(path.name) / file.relative_to(path))
    return out


def tab(studio: Studio, here: gr.Tab) -> None:
    """Build it, in the tab `here`."""

    def show(names: list[str]) -> tuple[Any, ...]:
        there = list(studio.reports())
        kept = [name for name in names if name in there]
        return overview(studio), gr.Dropdown(there, value=kept, visible=bool(there))

    def pick(names: list[str]) -> tuple[Any, ...]:
        runs = [studio.run(name) for name in names]
        shown = ""
        if len(runs) == 1:
            page = (runs[0].path / "report.html").read_text(encoding="utf-8")
            shown = fill("chosen.html", name=names[0], report=runs[0].report, page=page)
        elif runs:
            reports = list(zip(names, (run.report for run in runs), strict=True))
            command = typed(["compare", *(str(run.path) for run in runs), "--html", "all.html"])
            differ = compare(runs).differ
            shown = fill("chosen.html", report=None, reports=reports, differ=differ, limit=LIMIT, command=command)
        return shown, gr.Button(visible=len(runs) == 1), gr.File(visible=False)

    def export(names: list[str]) -> Any:
        return gr.File(str(packed(studio, names[0])), visible=True)

    table = html(elem_id="runs")
    chosen = gr.Dropdown(
        [],
        value=[],
        multiselect=True,
        label="Look at one, or at several beside each other",
        visible=False,
        elem_id="chosen-runs",
    )
    beside = html(elem_id="beside")
    take = gr.Button("Export: adapter, model card, report and config as a ZIP file", visible=False, elem_id="export")
    file = gr.File(label="Export", visible=False, interactive=False, elem_id="exported")
    chosen.change(told(pick), chosen, [beside, take, file], **QUIET)
    chosen.input(None, js="() => document.activeElement.blur()")  # or the list stays open, over what was chosen
    here.select(told(show), chosen, [table, chosen], **QUIET)
    take.click(told(export), chosen, file, api_visibility="private")
