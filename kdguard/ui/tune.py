"""The Tune tab: a file is dropped, looked at, and learned by a process of its own, which is watched from here."""

import functools
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from kdguard.config import TuneConfig, presets, resolve
from kdguard.errors import InputError
from kdguard.probes.packs import shipped_packs
from kdguard.report.build import verdict
from kdguard.report.run import CONFIG
from kdguard.ui import ask
from kdguard.ui.pack import PACK
from kdguard.ui.parts import GPU, QUIET, duration, fill, html, libraries, told
from kdguard.ui.progress import progress
from kdguard.ui.studio import FAILED, FINISHED, STOPPED, TRAINING, Studio

NO_BUDGET = "none"
OWN = "your own"
SHOWN = 3  # rows whose tokens are shown
POINTS = 500  # of a curve, at most
TUNES = "Start kdguard tune on an uploaded file, as a process; all but the file may be left out."
EVERY = 2  # seconds between two looks at a training
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def models(studio: Studio) -> list[str]:
    """What can be tuned: every preset, and the models of the runs that are here."""
    shipped = presets()
    known = {preset["model"] for preset in shipped.values()}
    others = {str(studio.config(name).get("model")) for name in studio.names() if (studio.root / name).is_dir()}
    return [*shipped, *sorted(others - known - {"None"})]


def asked_for(studio: Studio, data: Path | None, model: str, goal: str, budget: str, **more: Any) -> dict[str, Any]:
    """The flags of `kdguard tune` for what was chosen. Raises InputError for a model that only a path names."""
    named = {"preset": model} if model in presets() else {"model": model}
    if model not in models(studio) and (Path(model).exists() or not _HUB_ID.fullmatch(model)):
        raise InputError(
            f"{model}: neither a preset nor a model of the hub",
            "the page takes OWNER/NAME; for a folder of yours: kdguard tune DATA --model FOLDER",
        )
    flags = {"data": [str(data)] if data else None, **named}
    flags |= {"goal": goal if goal != "facts" else None, "budget": budget if budget != NO_BUDGET else None}
    flags |= {key: value for key, value in more.items() if value not in (None, "")}
    if packs := flags.pop("probes", None):
        pack = studio.root / PACK
        if OWN in packs and not pack.is_file():
            raise InputError("your own pack holds no probes yet", "make a question one in the Ask tab")
        flags["probes"] = [str(pack) if each == OWN else each for each in packs]
    return flags


def arguments(flags: dict[str, Any], out: Path, control: bool) -> list[str]:
    """The same as the command line has them."""
    found = ["tune", *(flags.get("data") or ["DATA"])]
    for key, value in flags.items():
        name = f"--{key.replace('_', '-')}"
        if key == "probes":
            found += [word for pack in value for word in (name, pack)]
        elif key == "guard":
            found += [] if value else ["--no-guard"]
        elif key != "data" and value is not None:
            found += [name, str(value)]
    return [*found, "--out", str(out), *(["--control"] if control else [])]


@functools.lru_cache(maxsize=32)
def needed_gib(config: str) -> float:
    """The peak of a run with this config, as JSON. Cached, for every key that is typed asks for it."""
    from kdguard.model.fit import estimate_gib, shape

    wanted = TuneConfig.model_validate_json(config)
    packing = (wanted.micro_batch_size or 1) * wanted.max_length if wanted.packing else None
    return estimate_gib(shape(wanted), wanted, wanted.max_length, packing)


def tab(studio: Studio, here: gr.Tab) -> tuple[gr.Button, gr.Dropdown]:
    """Build it, in the tab `here`. Returns the button that looks at what was kept, and the run that is watched."""

    def short(path: Path) -> str:
        """A path as one would type it here."""
        here = Path.cwd()
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    def read(file: str | None, asking: gr.Progress = gr.Progress()) -> tuple[str, Any, str | None]:  # noqa: B008 - how gradio hands it in
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
        return fill("read.html", error=None, checked=checked, lengths=said), free, file

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
            config = resolve(asked_for(studio, Path(file), model, "facts", NO_BUDGET, max_length=max_length))
            shown, _ = show(config, SHOWN)
        except InputError as error:
            return fill("tokens.html", error=_by_name(error, file))
        rows = [(row, list(runs(row.tokens))) for row in shown]
        return fill("tokens.html", error=None, rows=rows, model=config.model)

    def flags_of(file: Path | None, values: Sequence[Any]) -> tuple[dict[str, Any], bool]:
        model, goal, budget, guard, control, *more = values
        names = ("epochs", "lr", "rank", "max_length", "batch_size", "seed", "probes")
        flags = asked_for(studio, file, model, goal, budget, **dict(zip(names, more, strict=True)))
        return flags | ({} if guard else {"guard": False}), control

    def preview(file: str | None, name: str, *values: Any) -> str:
        try:
            flags, control = flags_of(studio.keep(Path(file)) if file else None, values)
        except InputError as error:
            return f"# {error.message}"
        out = studio.root / (name or "NAME")
        return shlex.join(["kdguard", *_here(arguments(flags, out, control), short)])

    def room(*values: Any) -> str:
        preset = presets().get(values[0])
        about = f"{preset['name']}: {preset['about']}" if preset else ""
        try:
            flags, _ = flags_of(None, values)
            config = resolve(flags)
            libraries()
            from kdguard.model.fit import memory

            where, free, total = memory()
            need = needed_gib(config.model_dump_json())
        except InputError as error:
            return fill("memory.html", about=about, need=None, said=f"{error.message}: {error.hint}")
        except (ValueError, OSError, RuntimeError) as error:
            return fill(
                "memory.html", about=about, need=None, said=f"how much memory this takes is not known ({error})"
            )
        return fill("memory.html", about=about, need=need, room=total, free=free, where=where)

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
        values = (
            model or _first_model(),
            goal,
            budget,
            guard,
            control,
            epochs,
            lr,
            rank,
            max_length,
            batch_size,
            seed,
            probes,
        )
        flags, twin = flags_of(Path(file), values)
        config = resolve(flags)
        if twin and not config.guard:
            raise InputError("the unguarded twin is this run itself", "switch the guard on, or the twin off")
        flags["data"] = [str(studio.keep(Path(file)))]
        ask.let_go()
        command = arguments(flags, studio.root / free, bool(twin))
        studio.start(free, command)
        return {"run": free, "command": shlex.join(["kdguard", *_here(command, short)])}

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
                plot=plot_training(found.losses[:: 1 + len(found.losses) // POINTS], found.sampled)
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
                label="Your data",
                file_types=[".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"],
                height=160,
                elem_id="data",
            )
            kept = gr.State(None)
            seen = html(elem_id="read")
            with gr.Accordion("Rows as the model sees them", open=False, visible=False, elem_id="tokens") as rows:
                coloured = html()
            model = gr.Dropdown(
                models(studio),
                value=_first_model(),
                allow_custom_value=True,
                label="Model",
                info="a preset, or OWNER/NAME from the hub",
                elem_id="model",
            )
            fits = html(elem_id="memory")
            with gr.Row():
                goal = gr.Radio(["facts", "style"], value="facts", label="Goal", elem_id="goal", min_width=140)
                budget = gr.Dropdown(
                    [NO_BUDGET, "0.5%", "1%", "2%", "5%"],
                    value=NO_BUDGET,
                    allow_custom_value=True,
                    label="Budget: forget at most",
                    elem_id="budget",
                    min_width=140,
                )
            with gr.Row():
                guard = gr.Checkbox(True, label="Guard old knowledge", min_width=140)
                control = gr.Checkbox(False, label="Train the unguarded twin too", min_width=140)
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
        with gr.Column(scale=4, min_width=320):
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
    for changed in (model.change, max_length.change):
        changed(told(tokens), [file, model, max_length], coloured, trigger_mode="always_last", **QUIET)
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
    began.success(lambda start: told(show)(start["run"]), started, choices, **QUIET)
    watched.input(told(live), watched, looked, **QUIET)
    timer.tick(told(live), watched, looked, **QUIET)
    here.select(told(show), watched, choices, **QUIET).then(preview, [file, name, *settings], command, **QUIET).then(
        room, settings, fits, **QUIET
    )
    halt.click(told(stop), watched, looked, **QUIET)
    again.click(told(resume), watched, looked, **QUIET, **GPU)

    return look, watched


def _first_model() -> str:
    """The preset a newcomer sees: the embedded model where there is no NVIDIA driver."""
    with suppress(Exception):
        import shutil

        if shutil.which("nvidia-smi"):
            return resolve({}, has_gpu=lambda: True).preset or "demo"
    return "demo"


def _here(words: Sequence[str], short: Any) -> list[str]:
    return [short(Path(word)) if Path(word).is_absolute() else word for word in words]


def _by_name(error: InputError, file: str) -> InputError:
    """The error without the folder that the upload lies in."""
    return InputError(error.message.replace(file, Path(file).name), error.hint.replace(file, Path(file).name))
