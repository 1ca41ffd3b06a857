"""The Tune tab: a file is dropped, looked at, and learned by a process of its own, which is watched from here."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from kdguard import card
from kdguard.config import TuneConfig, presets, resolve
from kdguard.errors import InputError, KdguardError
from kdguard.probes.packs import shipped_packs
from kdguard.report.build import verdict
from kdguard.report.run import CONFIG
from kdguard.ui import ask
from kdguard.ui.command import NO_BUDGET, OWN, SETTINGS, arguments, first_model, flags, models, needed_gib, typed
from kdguard.ui.parts import GPU, QUIET, duration, fill, html, libraries, told
from kdguard.ui.progress import progress
from kdguard.ui.studio import FAILED, FINISHED, STOPPED, TRAINING, Studio

SHOWN = 3  # rows whose tokens are shown
POINTS = 500  # of a curve, at most
EVERY = 2  # seconds between two looks at a training
TUNES = "Start kdguard tune on an uploaded file, as a process; all but the file may be left out."


def tab(studio: Studio, here: gr.Tab) -> tuple[gr.Button, gr.Dropdown]:
    """Build it, in the tab `here`. Returns the button that looks at what was kept, and the run that is watched."""

    def read(file: str | None, asking: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        if not file:
            return "", gr.skip(), None
        from kdguard.data.check import check, lengths
        from kdguard.terminal import in_words

        name = re.sub(r"[^\w.+=-]+", "-", Path(file).stem).strip("-.")[:80] or "run"
        taken = set(studio.names())
        free = next(each for each in (name, *(f"{name}-{n}" for n in range(2, 10_000))) if each not in taken)
        try:
            checked = check([file], progress=lambda done, total: asking((done, total), desc="Checking", unit="bytes"))
        except InputError as error:
            return fill("read.html", error=_by_name(error, file)), gr.skip(), file
        spread = lengths(checked.characters)
        said = in_words(spread, "characters") if spread else ""
        folder = f"{Path(file).parent}/"
        return fill("read.html", error=None, checked=checked, lengths=said, folder=folder), free, file

    def clear(file: str | None) -> tuple[Any, ...]:
        """Nothing is kept of a file that was only looked at."""
        if file:
            studio.forget(Path(file))
        return "", gr.Accordion(visible=False), "", None

    def tokens(file: str | None, model: str, max_length: str) -> str:
        if not file:
            return ""
        libraries()
        from kdguard.data.view import runs
        from kdguard.show import show

        try:
            lengths = [max_length if key == "max_length" else None for key in SETTINGS[1:]]
            config = configured(flags(studio, Path(file), [model, *lengths]))
            shown, _ = show(config, SHOWN)
        except InputError as error:
            return fill("tokens.html", error=_by_name(error, file))
        rows = [(row, list(runs(row.tokens))) for row in shown]
        return fill("tokens.html", error=None, rows=rows, model=config.model)

    def preview(file: str | None, name: str, *values: Any) -> str:
        try:
            chosen = flags(studio, studio.keep(Path(file)) if file else None, values)
        except InputError as error:
            return f"# {error.message}"
        return typed(arguments(chosen, studio.root / (name or "NAME")))

    def room(*values: Any) -> str:
        preset = presets().get(values[0])
        about = f"{preset['name']}: {preset['about']}" if preset else ""
        try:
            config = configured(flags(studio, None, values))
            libraries()
            need, fits_into = needed_gib(config.model_dump_json()), card.here()
        except KdguardError as error:
            return fill("memory.html", about=about, need=None, said=f"{error.message}: {error.hint}")
        return fill(
            "memory.html",
            about=about,
            need=need,
            card=fits_into,
            said="how much memory this architecture takes is not known",
        )

    def start(
        file: str,
        name: str | None = None,
        model: str | None = None,
        goal: str | None = None,
        budget: str | None = None,
        guard: bool | None = None,
        control: bool | None = None,
        epochs: str | None = None,
        lr: str | None = None,
        rank: str | None = None,
        max_length: str | None = None,
        batch_size: str | None = None,
        seed: str | None = None,
        probes: list[str] | None = None,
    ) -> dict[str, Any]:
        if not file:
            raise InputError("there are no data to learn", "drop a file first")
        studio.refuse_busy()
        free = studio.new_name((name or "").strip() or Path(file).stem)
        if control:
            studio.new_name(f"{free}-control")
        values = (model, goal, budget, guard, control, epochs, lr, rank, max_length, batch_size, seed, probes)
        configured(flags(studio, Path(file), values))
        command = arguments(flags(studio, studio.keep(Path(file)), values), studio.root / free)
        ask.let_go()
        studio.start(free, command)
        return {"run": free, "command": typed(command)}

    def live(name: str | None) -> tuple[Any, ...]:
        """How the watched run is getting on, and what can be done with it."""
        at = studio.state(name) if name else ""
        begun = bool(name) and (studio.root / name / CONFIG).is_file()
        stopping = at == TRAINING and studio.stopping(name)
        if not name:
            picture = fill("live.html", name=None)
        else:
            from kdguard.report.plots import plot_training

            found = progress(studio.events(name))
            said = [line.removeprefix("error ").removeprefix("  try ") for line in studio.said(name)[-2:]]
            picture = fill(
                "live.html",
                name=name,
                state=at,
                progress=found,
                unit=1_000_000 if found.in_words.endswith("in MB") else 1,
                left=duration(found.seconds_left),
                said=said,
                verdict=verdict(studio.run(name).report) if at == FINISHED else "",
                plot=plot_training(found.losses[:: 1 + len(found.losses) // POINTS], found.sampled, width=5.5)
                if found.losses
                else "",
                begun=begun,
            )
        return (
            picture,
            gr.Button("Stopping …" if stopping else "Stop", visible=at == TRAINING, interactive=not stopping),
            gr.Button(visible=begun and at in (STOPPED, FAILED)),
            gr.Button(visible=at == FINISHED),
            gr.Timer(active=at == TRAINING),
        )

    def show(name: str | None) -> tuple[Any, ...]:
        """The runs that can be watched: by default the one that is being trained."""
        going = studio.training()
        names = going + [each for each in studio.names() if each not in going and studio.state(each) != FINISHED]
        if name and name not in names and name in studio.names():
            names.append(name)
        name = going[0] if going and name not in going else name if name in names else next(iter(names), None)
        return (
            gr.Dropdown(names, value=name, visible=bool(names)),
            gr.Dropdown(models(studio)),
            *live(name),
        )

    def resume(name: str) -> tuple[Any, ...]:
        studio.refuse_busy()
        path = studio.path(name)
        ask.let_go()
        studio.start(name, ["tune", "--resume", "--out", str(path)])
        return live(name)

    def stop(name: str) -> tuple[Any, ...]:
        studio.stop(name)
        return live(name)

    def state(run: str) -> dict[str, Any]:
        """How a run is getting on: its state (training, stopped, failed, finished), the phase, how much of it is done,
        the seconds left of it, and the last losses."""
        found = progress(studio.events(run))
        last = found.losses[-1] if found.losses else {}
        words = {
            key: value for key, value in asdict(found).items() if key in ("phase", "done", "total", "seconds_left")
        }
        at = studio.state(run)
        if at != TRAINING:
            words["seconds_left"] = None
        return {"run": run, "state": at, **words, "ce": last.get("ce"), "kl": last.get("kl")}

    def end(run: str) -> dict[str, Any]:
        """Ask a run to save a checkpoint and end."""
        found = state(run)
        studio.stop(run)
        return found

    gr.api(told(state, as_text=True), api_name="progress")
    gr.api(told(end, as_text=True), api_name="stop")

    with gr.Row(elem_id="tune"):
        with gr.Column(scale=3, min_width=320):
            file = gr.File(
                label="Your data: JSONL, JSON, CSV, TSV or Parquet",
                file_types=[".jsonl", ".json", ".csv", ".tsv", ".parquet"],
                height=160,
                elem_id="data",
            )
            kept = gr.State(None)
            seen = html(elem_id="read")
            with gr.Accordion("Rows as the model sees them", open=False, visible=False, elem_id="tokens") as rows:
                coloured = html()
            model = gr.Dropdown(
                models(studio),
                value=first_model(),
                allow_custom_value=True,
                label="Model",
                info="a preset, or OWNER/NAME from the hub",
                elem_id="model",
            )
            fits = html(elem_id="memory")
            with gr.Row():
                goal = gr.Radio(["facts", "style"], value="facts", label="Goal", elem_id="goal", min_width=200)
                budget = gr.Dropdown(
                    [NO_BUDGET, "0.5%", "1%", "2%", "5%"],
                    value=NO_BUDGET,
                    allow_custom_value=True,
                    label="Forget at most",
                    elem_id="budget",
                    min_width=140,
                )
            guard = gr.Checkbox(True, label="Guard old knowledge")
            control = gr.Checkbox(False, label="Train the unguarded twin too")
            with gr.Accordion("More", open=False, elem_id="more-settings"):
                with gr.Row():
                    epochs, lr, rank = (
                        gr.Textbox(label=label, placeholder="by preset", min_width=100)
                        for label in ("Epochs", "Learning rate", "LoRA rank")
                    )
                with gr.Row():
                    max_length, batch_size, seed = (
                        gr.Textbox(label=label, placeholder="by preset", min_width=100)
                        for label in ("Longest row, tokens", "Rows a step", "Seed")
                    )
                probes = gr.CheckboxGroup([*shipped_packs(), OWN], value=[], label="Probes", info="none: the preset's")
            name = gr.Textbox(label="Name of the run", placeholder="by the data", elem_id="name")
            command = gr.Textbox(
                label="What will run", interactive=False, buttons=["copy"], lines=2, max_lines=6, elem_id="command"
            )
            begin = gr.Button("Start", variant="primary", elem_id="start")
            started = gr.JSON(label="run and command", visible=False)
        with gr.Column(scale=4, min_width=320, elem_id="progress"):
            watched = gr.Dropdown([], value=None, label="Run", visible=False, elem_id="watched")
            picture = html(fill("live.html", name=None), elem_id="live")
            with gr.Row():
                halt = gr.Button("Stop", visible=False, variant="stop", elem_id="stop", min_width=100)
                again = gr.Button("Resume", visible=False, variant="primary", elem_id="resume", min_width=100)
                look = gr.Button("See what it kept", visible=False, variant="primary", elem_id="look", min_width=100)
    timer = gr.Timer(EVERY, active=False)

    settings = [model, goal, budget, guard, control, epochs, lr, rank, max_length, batch_size, seed, probes]
    looked = [picture, halt, again, look, timer]
    file.upload(told(read), file, [seen, name, kept], show_progress_on=seen, api_visibility="private").then(
        lambda: gr.Accordion(visible=True), None, rows, **QUIET
    ).then(tokens, [file, model, max_length], coloured, api_visibility="private")
    file.clear(told(clear), kept, [seen, rows, name, kept], **QUIET)
    seen_anew = [model.change, max_length.change]
    gr.on(seen_anew, told(tokens), [file, model, max_length], coloured, trigger_mode="always_last", **QUIET)
    gr.on([each.change for each in (file, name, *settings)], preview, [file, name, *settings], command, **QUIET)
    sized = [model, goal, budget, guard, rank, max_length, batch_size]
    gr.on([each.change for each in sized], room, settings, fits, trigger_mode="always_last", **QUIET)
    began = begin.click(
        told(start),
        [file, name, *settings],
        started,
        api_name="tune",
        api_description=TUNES,
        show_progress="minimal",
        show_progress_on=picture,
        **GPU,
    )
    choices = [watched, model, *looked]
    began.success(lambda start: told(show)(start["run"]), started, choices, **QUIET).then(
        None, js="() => document.querySelector('#progress').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
    )
    watched.input(told(live), watched, looked, **QUIET)
    timer.tick(told(live), watched, looked, **QUIET)
    here.select(told(show), watched, choices, **QUIET).then(preview, [file, name, *settings], command, **QUIET).then(
        room, settings, fits, **QUIET
    )
    halt.click(told(stop), watched, looked, **QUIET)
    again.click(told(resume), watched, looked, **QUIET, **GPU)

    return look, watched


def configured(flags: dict[str, Any]) -> TuneConfig:
    """Raises InputError for a value that the command line would refuse."""
    return resolve({key: value for key, value in flags.items() if key != "control"}, memory=card.gpu_memory)


def _by_name(error: InputError, file: str) -> InputError:
    """The error without the folder that the upload lies in."""
    return InputError(error.message.replace(file, Path(file).name), error.hint.replace(file, Path(file).name))
