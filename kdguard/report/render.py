"""The templates that people read: pages, in which all text is escaped, and the model card."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{share:.1%}"
    environment.filters["markdown"] = _escape_markdown
    return environment.get_template(template + ".j2").render(**values)


def _escape_markdown(text: object) -> str:
    return "".join("\\" + c if c in "\\`*_{}[]<>()#+-!|~" else " " if c in "\r\n" else c for c in str(text))
