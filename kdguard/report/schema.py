"""What the files of a run folder have to hold: they may have been written by hand, or by nobody we know.

What a report of ours holds is kdguard.report.contract's `Report`; keys that came later may be missing in one.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from kdguard.errors import InputError
from kdguard.files import read_json, reason
from kdguard.probes.score import Answer
from kdguard.report.contract import Report

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


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
    ci95: _Interval | None


class _Kept(_Part):
    n: _Count
    known: _Count
    kept: _Count
    forgotten: _Count
    gained: _Count
    forgetting: _Share | None
    ci95: _Interval | None
    p_value: float
    change: float | None = None
    change_ci95: _Interval | None = None
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
    watched: _Count = 0
    allowed: _Count = 0
    forgotten: _Count = 0
    done: str = ""

    @model_validator(mode="after")
    def _what_is_told_of_is_there(self) -> Self:
        if "done" in self.model_fields_set and not {"watched", "allowed", "forgotten"} <= self.model_fields_set:
            raise ValueError("expected the counts that are told of")
        return self


class _Counts(_Part):
    n: _Count
    count: _Count


class _Of(_Part):
    probes: _Counts
    new: _Counts


class _Exported(_Part):
    to: str
    path: str
    weights: Literal["merged", "adapter"]
    onto: str | None
    type: str | None
    runtime: str | None
    learned: _Learned | None
    kept: _Kept | None
    same: _Of | None
    answers: Annotated[str, Field(pattern=r"^exported/\w[^/\\]*$")] | None

    @model_validator(mode="after")
    def _what_was_asked_has_figures(self) -> Self:
        if self.runtime and None in (self.learned, self.kept, self.same):
            raise ValueError("expected the figures of what was asked")
        return self


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
    warnings: list[str] = []
    exported: list[_Exported] = []

    @model_validator(mode="after")
    def _a_training_costs(self) -> Self:
        if not self.adopted and None in (self.cost.steps, self.cost.tokens, self.cost.seconds):
            raise ValueError("expected the cost of the training")
        return self


class _Point(_Part):
    strength: _Share
    learned: _Share | None
    forgetting: _Share | None


class _Near(_Part):
    where: str
    question: str
    answer: str


class _Often(_Near):
    named: _Count


class _Overlapping(_Near):
    overlap: float


class _Forgotten(_Part):
    id: str
    question: str
    base: str
    tuned: str
    rows: list[_Overlapping]


class _Moved(_Part):
    forgotten: float | None
    kept: float | None


class _Quarter(_Part):
    forgetting: _Share


class _Interference(_Part):
    near: _Quarter
    far: _Quarter
    p_value: float | None


class _Capacity(_Part):
    rank: _Count
    parameters: _Count
    new_facts: _Count
    learned: _Share | None


class _Cloning(_Part):
    trained: _Count
    known: _Count
    forgetting: _Share
    this_run: _Share


class _Explained(_Part):
    forgotten: _Count
    moved: _Moved
    interference: _Interference
    capacity: _Capacity
    cloning: _Cloning | None
    often: list[_Often]
    probes: list[_Forgotten]


_REPORT = TypeAdapter(_Report)
_DIAL = TypeAdapter(Annotated[list[_Point], Field(min_length=1)])
_EXPLAINED = TypeAdapter(_Explained)
_ANSWER = TypeAdapter(Answer)


def read_report(path: Path) -> Report:
    """The contents of a `report.json`, with further keys as they are. Raises InputError that names what is wrong."""
    found: Report = read_json(path, _REPORT, "report", "run it again, or take the file from where it came once more")
    return found


def read_dial(path: Path) -> list[dict[str, Any]]:
    """The points of a `dial.json`. Raises InputError that names what is wrong."""
    found: list[dict[str, Any]] = read_json(path, _DIAL, "points of a dial", f"rm {path}; kdguard dial measures anew")
    return found


def read_explained(path: Path) -> dict[str, Any]:
    """The contents of an `explain.json`. Raises InputError that names what is wrong."""
    found: dict[str, Any] = read_json(path, _EXPLAINED, "explanation", f"rm {path}; kdguard explain writes it anew")
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
        raise InputError(f"{where}: found no answer ({reason(error)})", "run it again") from None
