"""`Report`: what stands in `report.json`, for programs. Shares are 0 to 1. No torch.

Keys are only ever added; where one would change its meaning, `format` goes up.
"""

from typing import Any, NotRequired, TypedDict

Interval = tuple[float, float]


class GuardUsed(TypedDict):
    """`weight` is λ, 0 without the guard; `rehearsal` is rehearsal rows per training row."""

    weight: float
    teacher: str
    rehearsal: float


class Learned(TypedDict):
    """Shares of the `n` training questions answered rightly, with Clopper and Pearson's 95 % interval of `after`."""

    n: int
    before: float
    after: float
    ci95: Interval | None


class Kept(TypedDict):
    """What became of the `n` probes; `forgetting` is `forgotten` / `known`. See kdguard.report.figures.Kept."""

    n: int
    known: int
    kept: int
    forgotten: int
    gained: int
    forgetting: float | None
    ci95: Interval | None
    p_value: float
    change: float | None
    change_ci95: Interval | None
    told: str


class Level(TypedDict):
    """What was forgotten of the known probes of one SliCK level (arXiv 2405.05904)."""

    level: str
    known: int
    forgotten: int
    forgetting: float
    ci95: Interval


class Drift(TypedDict):
    """Mean KL(base || tuned) per token, on text that the base wrote."""

    nats_per_token: float


class Cost(TypedDict):
    """Of the training alone, but `total_seconds` of the whole command. An adopted adapter's training is not known.

    leaner: what was done where memory ran out, in words.
    """

    steps: int | None
    tokens: int | None
    seconds: float | None
    tokens_per_second: float | None
    peak_memory_gib: float
    total_seconds: NotRequired[float]
    leaner: NotRequired[list[str]]


class Budget(TypedDict):
    """Whether forgetting stayed within `limit` on the scored probes; what the `watched` ones said; what was done."""

    limit: float
    met: bool
    watched: int
    allowed: int
    forgotten: int
    done: str
    reason: str | None


class Counted(TypedDict):
    n: int
    count: int


class Counts(TypedDict):
    probes: Counted
    new: Counted


class Exported(TypedDict):
    """An export, and how it answered; figures are None where nothing was asked.

    weights: merged or adapter. onto: the base that the adapter was merged into. tried: how each such base answered.
    type: of GGUF. runtime: what asked it. learned, kept: as in the report. same: answers that are the tuned model's
    word for word. lost: right answers of the tuned model that it no longer gives. answers: their folder in the run.
    """

    to: str
    path: str
    weights: str
    onto: str | None
    tried: list[dict[str, Any]]
    type: str | None
    llama_cpp: str | None
    runtime: str | None
    strength: float
    learned: Learned | None
    kept: Kept | None
    same: Counts | None
    lost: Counts | None
    answers: str | None


class Report(TypedDict):
    """The contents of `report.json`.

    data: the training data in short; None for an adapter adopted without them. adopted: the adapter that another tool
    trained, or None. strength: the scale of the adapter, 0 to 1. warnings: what to mind in these figures, in words.
    exported: how each export answered.
    """

    format: int
    kdguard: str
    model: str
    data: str | None
    adopted: str | None
    goal: str
    seed: int
    guard: GuardUsed
    cost: Cost
    strength: float
    learned: Learned
    kept: Kept
    levels: list[Level]
    drift: Drift
    budget: Budget | None
    warnings: list[str]
    exported: NotRequired[list[Exported]]
