"""The paired figures of a run: learned, kept, forgotten, gained, with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from kdguard.probes.score import Answer

Interval = tuple[float, float]


@dataclass(frozen=True)
class Learned:
    """Shares of the training questions answered rightly; `ci95` is Clopper and Pearson's interval of `after`."""

    n: int
    before: float
    after: float
    ci95: Interval | None


@dataclass(frozen=True)
class Kept:
    """What became of the probes.

    `forgetting` = `forgotten` / `known` with Clopper and Pearson's exact interval, which stays honest at 0 forgotten;
    both are None when nothing was known. `p_value` is McNemar's exact one over all probes: how likely as lopsided a
    split of forgotten against gained is if tuning changed nothing (1 when there is neither).
    """

    n: int
    known: int
    kept: int
    forgotten: int
    gained: int
    forgetting: float | None
    ci95: Interval | None
    p_value: float


@dataclass(frozen=True)
class Pair:
    """One question with the base's answer and the tuned model's."""

    before: Answer
    after: Answer

    @property
    def outcome(self) -> str:
        """`kept`, `forgotten`, `gained` or `missed` (neither answered it)."""
        if self.before.correct:
            return "kept" if self.after.correct else "forgotten"
        return "gained" if self.after.correct else "missed"


def pair(before: Sequence[Answer], after: Sequence[Answer]) -> list[Pair]:
    """Both answers to each question, told by its id. Raises ValueError when the two were asked different questions."""
    by_id = {answer.id: answer for answer in after}
    if set(by_id) != {answer.id for answer in before}:
        raise ValueError("before and after do not hold the same questions")
    return [Pair(answer, by_id[answer.id]) for answer in before]


def learned(before: Sequence[Answer], after: Sequence[Answer]) -> Learned:
    n, right = len(after), sum(answer.correct for answer in after)
    share_before = sum(answer.correct for answer in before) / n if n else 0.0
    return Learned(n, share_before, right / n if n else 0.0, share_interval(right, n))


def kept(pairs: Sequence[Pair]) -> Kept:
    outcomes = [pair.outcome for pair in pairs]
    stayed, forgotten, gained = (outcomes.count(outcome) for outcome in ("kept", "forgotten", "gained"))
    known = stayed + forgotten
    changed = forgotten + gained
    return Kept(
        n=len(pairs),
        known=known,
        kept=stayed,
        forgotten=forgotten,
        gained=gained,
        forgetting=forgotten / known if known else None,
        ci95=share_interval(forgotten, known),
        p_value=float(binomtest(forgotten, changed, 0.5).pvalue) if changed else 1.0,
    )


def share_interval(count: int, n: int) -> Interval | None:
    """The exact 95 % interval of a share (Clopper and Pearson 1934); None when there is nothing to count."""
    if not n:
        return None
    interval = binomtest(count, n).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)
