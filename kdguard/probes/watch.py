"""Watched probes: a share of a pack that steers a budget, so that the others can score it. No torch."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

STEP = 50  # probes
SURE = 0.8  # how sure the watched probes have to make us that the budget is kept
ROOM = 0.6  # of the limit: how much the watched probes have to be able to allow

T = TypeVar("T")


def split(probes: Sequence[T], seed: int, limit: float) -> tuple[list[T], list[T]]:
    """(watched, scored): a seeded sample of the probes, and the rest, both in their order.

    As many are watched as it takes for ROOM of the limit to be allowed, but never more than half of them: where fewer
    watch, so little is allowed that a run well within the limit would be turned down for want of certainty.
    """
    half = len(probes) // 2
    n = next((n for n in range(STEP, half, STEP) if Allowance(limit, n).forgotten >= ROOM * limit * n > 0), half)
    watched = set(random.Random(seed).sample(range(len(probes)), n))
    return (
        [probe for i, probe in enumerate(probes) if i in watched],
        [probe for i, probe in enumerate(probes) if i not in watched],
    )


@dataclass(frozen=True)
class Allowance:
    """How many of the watched known probes may be forgotten for `limit` to be kept on the others.

    forgotten: the most of which the one-sided Clopper-Pearson bound at SURE is at most the limit; where no count is,
    0. needed: known probes to watch for 0 to say enough.
    """

    limit: float
    known: int

    def _bound(self, forgotten: int) -> float:
        from scipy.stats import beta

        return float(beta.ppf(SURE, forgotten + 1, self.known - forgotten)) if forgotten < self.known else 1.0

    @property
    def needed(self) -> float:
        if self.limit in (0, 1):
            return math.inf if self.limit == 0 else 0
        return math.ceil(math.log(1 - SURE) / math.log(1 - self.limit))

    @property
    def forgotten(self) -> int:
        allowed = 0
        while allowed < self.known and self._bound(allowed + 1) <= self.limit:
            allowed += 1
        return allowed


@dataclass(frozen=True)
class Settled:
    """What a budget made of the end of training.

    strength: of the adapter as it stands now. forgotten: watched probes that it forgets. done: in words.
    """

    allowance: Allowance
    strength: float
    forgotten: int
    done: str
