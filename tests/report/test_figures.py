"""The proof's arithmetic, against scipy's own and against cases a person can count."""

import random

import pytest
from scipy.stats import binom

from kdguard.probes.score import Answer
from kdguard.report.figures import kept, learned, pair, share_interval


def answers(rights) -> list[Answer]:
    return [Answer(str(i), "c", "q?", ("x",), "x" if right else "y", bool(right)) for i, right in enumerate(rights)]


def figures(before, after):
    return kept(pair(answers(before), answers(after)))


def test_the_counts_a_person_would_make():
    found = figures([1, 1, 1, 0, 0], [1, 0, 1, 1, 0])
    assert (found.n, found.known, found.kept, found.forgotten, found.gained) == (5, 3, 2, 1, 1)
    assert found.forgetting == pytest.approx(1 / 3)


def test_mcnemar_is_the_exact_binomial_on_a_thousand_tables():
    rng = random.Random(0)
    for _ in range(1000):
        n = rng.randrange(1, 40)
        before, after = ([rng.random() < 0.6 for _ in range(n)] for _ in range(2))
        found = figures(before, after)
        b, c = found.forgotten, found.gained
        expected = min(1.0, 2 * binom.cdf(min(b, c), b + c, 0.5)) if b + c else 1.0
        assert found.p_value == pytest.approx(expected)


def test_nothing_changed_and_nothing_known():
    assert figures([1, 0], [1, 0]).p_value == 1.0
    nothing = figures([0, 0], [0, 1])
    assert nothing.forgetting is None and nothing.ci95 is None
    assert figures([], []).n == 0
    assert learned([], []).ci95 is None


def test_nothing_forgotten_is_not_certainty():
    """A bootstrap of 0 of 100 says 0 to 0; the exact interval says up to 3.6 %."""
    assert share_interval(0, 100) == pytest.approx((0.0, 0.0362), abs=1e-4)


def test_other_questions_after_than_before_are_refused():
    with pytest.raises(ValueError, match="same questions"):
        pair(answers([1, 1]), answers([1]))
