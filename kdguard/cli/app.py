"""The application, and what its commands have in common: flags, how they listen to a run, how they end."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kdguard import __version__
from kdguard.config import TuneConfig
from kdguard.events import Events

app = typer.Typer(
    name="kdguard",
    help="Fine-tune a language model on your own data without making it forget what it knew.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

OVER_BUDGET = 3
INTERRUPTED = 130


def flag(field: str, *names: str) -> Any:
    """A `tune` flag: its help and default stand in TuneConfig."""
    info = TuneConfig.model_fields[field]
    default = (
        ""
        if info.is_required() or info.default is None or "[default" in (info.description or "")
        else f" [default: {info.default}]"
    )
    return typer.Option(*names, help=f"{info.description}{default}".replace("[", "\\["), show_default=False)


def _warn_of_code(on: bool) -> bool:
    from kdguard.terminal import err

    if on:
        err.print(
            "warning  --trust-remote-code: Python code that comes with the model will run here and can do all that "
            "you can: read and delete your files, use your network",
            style="yellow",
            soft_wrap=True,
            markup=False,
        )
    return on


Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", callback=_warn_of_code, help=TuneConfig.model_fields["trust_remote_code"].description
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON on standard output and nothing else")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    if version:
        print(f"kdguard {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def fail(code: int, message: str, hint: str) -> int:
    """Say what went wrong and the next thing to type; returns the exit code."""
    from kdguard.terminal import print_error

    print_error(message, hint)
    return code


@contextmanager
def listening(as_json: bool, model: str) -> Iterator[Events]:
    """The events of a story, shown as they happen: on standard error when standard output is for JSON."""
    from kdguard.terminal import Terminal, console, err

    in_hub = model != "demo" and not Path(model).is_dir()
    quiet_libraries(show_downloads=in_hub)
    terminal = Terminal(err if as_json else console, show_load=not in_hub)
    try:
        yield Events(terminal)
    finally:
        terminal.close()


def show_runs(paths: list[Path], as_json: bool) -> None:
    """What a command has just written: the last run's report alone as JSON, or all of them as tables."""
    from kdguard.report.run import read_run

    runs = [read_run(path) for path in paths]
    if as_json:
        print(json.dumps(runs[-1].report, indent=2))
    else:
        compare_runs(runs, as_json=False)


def compare_runs(runs: list[Any], as_json: bool) -> None:
    from kdguard.report.build import verdict
    from kdguard.tables import print_comparison, print_run
    from kdguard.terminal import console

    if as_json:
        print(json.dumps([{"run": str(run.path), **run.report} for run in runs], indent=2))
    elif len(runs) == 1:
        print_run(console, runs[0], verdict(runs[0].report))
    else:
        print_comparison(console, runs)


def gpu_memory() -> float | None:
    """GiB of the GPU that torch would use; None where there is none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


def quiet_libraries(*, show_downloads: bool) -> None:
    """The libraries' own progress bars and notes would write over ours."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not show_downloads:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("transformers", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
