"""A config file, which may be somebody else's: it sets values, and runs, reads and writes nothing outside its place."""

import os
import re
import shlex
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from kdguard.errors import InputError
from kdguard.files import anybody_writes

LARGEST = 2**20  # bytes
_PATHS = "data", "probes", "model"
_HINT = "one `key: value` a line; keys are the flags of `kdguard tune`"


class _Loader(yaml.SafeLoader):
    """Without aliases, ten lines of which make more values than memory holds, and with text that can be written."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError("found an alias", problem_mark=self.get_mark())
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if isinstance(node.value, str) and re.search("[\0\ud800-\udfff]", node.value):
            raise yaml.MarkedYAMLError("found half of a character or a NUL", problem_mark=node.start_mark)
        return super().construct_scalar(node)


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a config file, as `TuneConfig` names them. Raises InputError by `file:line`.

    `out` and what is named by a relative path stay below the working folder, where relative paths begin, also through
    links. For what is named by an absolute path see `refuse_absolute`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file", "kdguard tune DATA --config FILE.yaml")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: found {path.stat().st_size:,} bytes, expected a config of a few lines", _HINT)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    # The last five: PyYAML's own, of what is no date, no number, no bool, or nested too deep.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{path}:{mark.line + 1}: not YAML" if mark else f"{path}: not YAML", _HINT) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: found {type(values).__name__}, expected keys", "one `key: value` a line")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key, name in _named(values):
        if ".." in _parts(name) or (not Path(name).is_absolute() and _leads_out(name)):
            raise InputError(f"{path}: found {name[:100]!r} as {key}, which leads out of its folder", _typed(key, name))
    out = None if values.get("out") is None else str(values["out"])
    if out is not None and (".." in _parts(out) or PureWindowsPath(out).anchor or _leads_out(out)):
        raise InputError(
            f"{path}: found {out[:100]!r} as out, expected a folder below this one",
            f"--out {out[:100]!r}, if it is meant",
        )
    return values


def refuse_absolute(path: Path, values: dict[str, Any]) -> None:
    """Raise InputError for an absolute path in a config file that is not this user's own alone.

    The config of a run names its data by absolute paths, which are read only, and has no `out`.
    """
    if not hasattr(os, "getuid"):  # Windows
        return
    for key, name in _named(values):
        if not Path(name).is_absolute():
            continue
        found = f"{path}: found {name[:100]!r} as {key}, an absolute path, in a file"
        if path.stat().st_uid != os.getuid():
            raise InputError(f"{found} of another user", f"{_typed(key, name)}; a copy of the file is your own")
        if anybody_writes(path):
            raise InputError(f"{found} that anybody may write", f"chmod o-w {shlex.quote(str(path))}, once you read it")


def _named(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The keys and names of what a config has read."""
    found = ((key, values.get(key)) for key in _PATHS)
    each = ((key, name) for key, value in found for name in (value if isinstance(value, list) else [value]))
    return [(key, name) for key, name in each if isinstance(name, str)]


def _typed(key: str, name: str) -> str:
    return f"kdguard tune {name[:100]!r}" if key == "data" else f"--{key} {name[:100]!r}, if it is meant"


def _leads_out(name: str) -> bool:
    here = Path.cwd().resolve()
    return not Path(os.path.realpath(here / name)).is_relative_to(here)


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts + PureWindowsPath(name).parts
