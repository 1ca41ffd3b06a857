"""Every command with its flags, as tables: what `--help` says, for `docs/commands.md`."""

from collections.abc import Iterator
from typing import Any

import typer.main

from kdguard.cli import app


def leaves(command: Any = None, words: tuple[str, ...] = ("kdguard",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command that does something, with the words that call it."""
    command = command or typer.main.get_command(app)
    for name, each in getattr(command, "commands", {}).items():
        yield from leaves(each, (*words, name))
    if not hasattr(command, "commands"):
        yield words, command


def commands() -> str:
    """A section a command: what it does, its arguments and its flags."""
    return "\n\n".join(_section(" ".join(words), command) for words, command in leaves())


def _section(words: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    flags = [param for param in command.params if param.param_type_name == "option" and not param.hidden]
    called = " ".join([words, *map(_placeholder, arguments)])
    rows = [(f"`{_placeholder(argument)}`", argument.help) for argument in arguments]
    rows += [("`" + "`, `".join([*flag.opts, *flag.secondary_opts]) + "`", flag.help) for flag in flags]
    lines = [f"| {name} | {_cell(told)} |" for name, told in rows]
    about = "\n".join(line.strip() for line in (command.help or "").splitlines())
    return "\n".join([f"## `{called}`", "", about, "", "| | |", "| --- | --- |", *lines])


def _placeholder(argument: Any) -> str:
    name = (argument.metavar or argument.name).strip("[]").upper()
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _cell(told: str | None) -> str:
    return (told or "").replace("\\[", "[").replace("|", "\\|").replace("<", "&lt;")
