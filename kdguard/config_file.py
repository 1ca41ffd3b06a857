"""A config file, which may be somebody else's: it sets values, and runs, reads and writes nothing outside its place."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from kdguard.errors import InputError

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

    `out` stays below the working folder, and what is named by a relative path stays beside or below it. The config of
    a run names its data by absolute paths, which are read only, and has no `out`.
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
    for key in _PATHS:
        _refuse_outside(path, key, values.get(key))
    if values.get("out") is not None:
        _refuse_out(path, values["out"])
    return values


def _refuse_outside(path: Path, key: str, value: Any) -> None:
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and ".." in _parts(name):
            raise InputError(
                f"{path}: found {name[:100]!r} as {key}, which leads out of its folder",
                f"--{key} {name[:100]!r}, if it is meant" if key != "data" else f"kdguard tune {name[:100]!r}",
            )


def _refuse_out(path: Path, value: Any) -> None:
    here = Path.cwd().resolve()
    name = str(value)[:1000]
    leads_out = ".." in _parts(name) or bool(PureWindowsPath(name).anchor) or Path(name).is_absolute()
    if leads_out or not (here / name).resolve().is_relative_to(here):
        raise InputError(
            f"{path}: found {name[:100]!r} as out, expected a folder below this one",
            f"--out {name[:100]!r}, if it is meant",
        )


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts + PureWindowsPath(name).parts
