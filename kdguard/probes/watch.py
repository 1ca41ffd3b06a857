"""Watched probes: a share of a pack that steers a budget, so that the others can score it. No torch."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy.stats import beta

WATCHED_SHARE = 0.25
MAX_WATCHED = 500
SURE = 0.9  # how sure the watched probes have to make us that the budget is kept

T = TypeVar("T")


def split(probes: Sequence[T], seed: int, limit: float) -> tuple[list[T], list[T]]:
    """(watched, scored): a seeded sample of the probes, and the rest, both in their order.

    WATCHED_SHARE of them up to MAX_WATCHED, or as many as the limit needs, but never more than half.
    """
    n = min(MAX_WATCHED, round(len(probes) * WATCHED_SHARE))
    n = int(min(max(n, Allowance(limit, 0).needed), len(probes) // 2))
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
        return float(beta.ppf(SURE, forgotten + 1, self.known - forgotten)) if forgotten < self.known else 1.0

    @property
    def needed(self) -> float:
        if self.limit in (0, 1):
            return math.inf if self.limit == 0 else 0
        return math.ceil(math.log(1 - SURE) / math.log(1 - self.limit))

    @property
    def forgotten(self) -> int:
        return max((k for k in range(self.known + 1) if self._bound(k) <= self.limit), default=0)


@dataclass(frozen=True)
class Settled:
    """What a budget made of the end of training.

    strength: of the adapter as it stands now. forgotten: watched probes that it forgets. done: in words.
    """

    allowance: Allowance
    strength: float
    forgotten: int
    done: str
