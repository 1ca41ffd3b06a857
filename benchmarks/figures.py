"""What the benchmarks wrote, read back."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PLAIN, OURS = "plain SFT", "kdguard's defaults"

Row = dict[str, Any]


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def groups(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    """The rows by what they have under `key`, in the order in which that comes first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def mean(rows: Iterable[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)
