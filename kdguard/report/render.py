"""The templates that people read: pages, in which all text is escaped, and the model card."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, folder: Path = TEMPLATES, /, **values: Any) -> str:
    """A template of `folder`, filled; it may include the report's own."""
    return _environment(folder).get_template(template + ".j2").render(**values)


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{share:.1%}"
    environment.filters["markdown"] = _escape_markdown
    return environment


def _escape_markdown(text: object) -> str:
    return "".join("\\" + c if c in "\\`*_{}[]<>()#+-!|~" else " " if c in "\r\n" else c for c in str(text))
