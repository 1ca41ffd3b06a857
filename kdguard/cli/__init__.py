"""The commands: parse, call, print. Heavy imports live inside them, so that `--help` answers at once."""

from kdguard.cli import tune, runs, export, probe, data, fit, doctor  # noqa: F401, I001  in the order in which the help lists them
from kdguard.cli.app import INTERRUPTED, app, fail

__all__ = ["INTERRUPTED", "app", "fail"]
