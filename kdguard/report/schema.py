"""What `report.json` and a file of answers have to hold: they may have been written by hand, or by nobody we know.

What a report of ours holds is kdguard.report.contract's `Report`; keys that came later may be missing in one.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from kdguard.errors import InputError
from kdguard.probes.score import Answer
from kdguard.report.contract import Report

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Interval = Annotated[list[float], Field(min_length=2, max_length=2)] | None


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Guard(_Part):
    weight: float
    teacher: str
    rehearsal: float


class _Learned(_Part):
    n: _Count
    before: _Share
    after: _Share
    ci95: _Interval


class _Kept(_Part):
    n: _Count
    known: _Count
    kept: _Count
    forgotten: _Count
    gained: _Count
    forgetting: _Share | None
    ci95: _Interval
    p_value: float
    change: float | None = None
    change_ci95: _Interval = None
    told: Annotated[str, Field(min_length=1)] = "-"

    @model_validator(mode="after")
    def _what_is_told_of_is_there(self) -> Self:
        if self.known and self.forgetting is None:
            raise ValueError("expected the forgetting of what was known")
        if "told" in self.model_fields_set and not {"change", "change_ci95"} <= self.model_fields_set:
            raise ValueError("expected the change that is told of")
        return self


class _Level(_Part):
    level: str
    known: _Count
    forgotten: _Count
    forgetting: _Share
    ci95: _Interval


class _Drift(_Part):
    nats_per_token: float


class _Cost(_Part):
    steps: _Count | None
    tokens: _Count | None
    seconds: float | None
    peak_memory_gib: float
    leaner: list[str] = []


class _Budget(_Part):
    limit: _Share
    met: bool
    reason: str | None = None


class _Report(_Part):
    format: Literal[1]
    kdguard: str
    model: str
    data: str | None
    adopted: str | None = None
    goal: str
    seed: int
    guard: _Guard
    strength: Annotated[float, Field(gt=0, le=1)]
    learned: _Learned
    kept: _Kept
    levels: list[_Level] = []
    drift: _Drift
    cost: _Cost
    budget: _Budget | None

    @model_validator(mode="after")
    def _a_training_costs(self) -> Self:
        if not self.adopted and None in (self.cost.steps, self.cost.tokens, self.cost.seconds):
            raise ValueError("expected the cost of the training")
        return self


_ANSWER = TypeAdapter(Answer)


def read_report(path: Path) -> Report:
    """The contents of a `report.json`, with further keys as they are. Raises InputError that names what is wrong."""
    try:
        found: Report = json.loads(path.read_bytes())
        _Report.model_validate(found)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: found no report ({_reason(error)})", "run it again, or take the file from where it came once more"
        ) from None
    return found


def read_answers(path: Path) -> list[Answer]:
    """The answers in a file, one a line. Raises InputError by `file:line`."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})", f"ls -l {path}") from None
    return [_answer(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]


def _answer(line: bytes, where: str) -> Answer:
    try:
        return _ANSWER.validate_json(line, strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: found no answer ({_reason(error)})", "run it again") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join(filter(None, [".".join(map(str, first["loc"]))[:100], first["msg"][:200]]))
    return "nested too deep" if isinstance(error, RecursionError) else str(error).split("\n")[0][:200]
