"""The paired figures of a run: learned, kept, forgotten, gained, with their intervals.

SciPy takes half a second to load, and reading a finished run does not need it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdguard.probes.score import LEVELS, Answer

OUTCOMES = ("kept", "forgotten", "gained", "missed")
Interval = tuple[float, float]
FEW_KNOWN = 50  # of fewer, even 0 forgotten leaves room for more than 7 % at 95 % confidence
FEW_CHANGED = 6  # of fewer, no split reaches p < 0.05 in McNemar's exact test


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
    split of forgotten against gained is if tuning changed nothing (1 when there is neither). `change` is the share of
    right answers after less that before, over all probes, and `change_ci95` its paired bootstrap interval, which says
    nothing where nothing changed: None.
    """

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

    @property
    def told(self) -> str:
        """How sure that is, in words."""
        if self.ci95 is None:
            return "nothing was known: forgetting cannot be told"
        if self.known < FEW_KNOWN:
            return f"{self.known:,} known probes are too few to tell"
        if not self.forgotten + self.gained:
            return f"no answer changed; at 95 % confidence at most {self.ci95[1]:.1%} is forgotten"
        if self.forgotten + self.gained < FEW_CHANGED:
            return f"{self.forgotten + self.gained} changed answers are too few to tell from chance"
        if self.p_value >= 0.05:
            return f"losses and gains are as even as chance makes them (McNemar p = {self.p_value:.2f})"
        p_value = f"= {self.p_value:.4f}" if self.p_value >= 0.0001 else "< 0.0001"
        more = "lost than gained" if self.forgotten > self.gained else "gained than lost"
        return f"more was {more}, beyond chance (McNemar p {p_value})"


@dataclass(frozen=True)
class Pair:
    """One question with the base's answer and the tuned model's."""

    before: Answer
    after: Answer

    @property
    def outcome(self) -> str:
        """One of OUTCOMES; `missed` is what neither answered."""
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
    from scipy.stats import binomtest

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
        change=(gained - forgotten) / len(pairs) if pairs else None,
        change_ci95=change_interval(forgotten, gained, len(pairs)),
    )


def change_interval(forgotten: int, gained: int, n: int) -> Interval | None:
    """The 95 % percentile interval of (gained - forgotten) / n over 10,000 resamples of the n pairs.

    A resample of pairs of which each is lost, gained or neither is a draw from a multinomial.
    """
    if not forgotten + gained:
        return None
    from numpy import quantile
    from scipy.stats import multinomial

    shares = [forgotten / n, gained / n, 1 - (forgotten + gained) / n]
    draws = multinomial(n, shares, seed=0).rvs(10_000)
    low, high = quantile((draws[:, 1] - draws[:, 0]) / n, [0.025, 0.975])
    return float(low), float(high)


def by_category(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """How many probes of each category were kept, forgotten, gained and missed; the most forgotten first."""
    found: dict[str, dict[str, int]] = {}
    for each in pairs:
        counts = found.setdefault(each.before.category, dict.fromkeys(OUTCOMES, 0))
        counts[each.outcome] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["forgotten"] / sum(item[1].values())))


def by_level(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """What was forgotten of the known probes at each SliCK level that some have, the best known first."""
    found = []
    for level in LEVELS:
        mine = kept([pair for pair in pairs if pair.before.correct and pair.before.level == level])
        if mine.known:
            figures = {"known": mine.known, "forgotten": mine.forgotten, "forgetting": mine.forgetting}
            found.append({"level": level, **figures, "ci95": mine.ci95})
    return found


def share_interval(count: int, n: int) -> Interval | None:
    """The exact 95 % interval of a share (Clopper and Pearson 1934); None when there is nothing to count."""
    if not n:
        return None
    from scipy.stats import binomtest

    interval = binomtest(count, n).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)
