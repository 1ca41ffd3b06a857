"""`kdguard doctor`: what is wrong with this computer, and the command that mends it."""

import json
from dataclasses import asdict

import typer

from kdguard.cli.app import Json, app, listening


@app.command(epilog="kdguard doctor\n\nkdguard doctor --json")
def doctor(as_json: Json = False) -> None:
    """Look at GPU, driver, libraries, disk and network: what is wrong, and the command that mends it.

    Exit code 1 if something is wrong; a warning is not.
    """
    from kdguard.doctor import WRONG, examine
    from kdguard.terminal import console, print_checks

    with listening(as_json, "demo") as events:
        checks = examine(lambda name: events.emit("phase", name=name))
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print_checks(console, checks)
    if any(check.state == WRONG for check in checks):
        raise typer.Exit(1)
