"""The proof's arithmetic, against scipy's own and against cases a person can count."""

import random

import pytest
from numpy import mean
from scipy.stats import binom, bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from kdguard.probes.score import Answer
from kdguard.report.figures import by_level, kept, learned, pair, share_interval


def answers(rights) -> list[Answer]:
    return [Answer(str(i), "c", "q?", ("x",), "x" if right else "y", bool(right)) for i, right in enumerate(rights)]


def figures(before, after):
    return kept(pair(answers(before), answers(after)))


def test_the_counts_a_person_would_make():
    found = figures([1, 1, 1, 0, 0], [1, 0, 1, 1, 0])
    assert (found.n, found.known, found.kept, found.forgotten, found.gained) == (5, 3, 2, 1, 1)
    assert found.forgetting == pytest.approx(1 / 3)


def test_the_statistics_are_scipys_and_statsmodels_on_a_thousand_tables():
    rng = random.Random(0)
    for i in range(1000):
        n = rng.randrange(0, 40)
        before, after = ([rng.random() < 0.6 for _ in range(n)] for _ in range(2))
        if i % 10 == 0:
            after = before  # nothing changed
        found = figures(before, after)
        b, c = found.forgotten, found.gained
        assert found.p_value == pytest.approx(min(1.0, 2 * binom.cdf(min(b, c), b + c, 0.5)) if b + c else 1.0)
        table = [[found.kept, b], [c, n - found.known - c]]
        assert found.p_value == pytest.approx(mcnemar(table, exact=True).pvalue if b + c else 1.0)
        if found.known:
            assert found.ci95 == pytest.approx(proportion_confint(b, found.known, method="beta"), abs=1e-9)
        else:
            assert found.ci95 is None and found.forgetting is None


def test_the_interval_of_the_change_is_the_paired_bootstraps():
    rng = random.Random(1)
    for _ in range(5):
        before, after = ([rng.random() < share for _ in range(200)] for share in (0.9, 0.7))
        found = figures(before, after)
        change = [b - a for a, b in zip(before, after, strict=True)]
        wanted = bootstrap((change,), mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
        assert found.change == pytest.approx(mean(change))
        assert found.change_ci95 == pytest.approx(tuple(wanted), abs=0.01)


@pytest.mark.parametrize(
    "kept_, forgotten, gained, words",
    [
        (0, 0, 3, "cannot be told"),
        (20, 2, 0, "22 known probes are too few"),
        (1000, 0, 0, "at most 0.4% is forgotten"),
        (1000, 3, 2, "5 changed answers are too few"),
        (1000, 5, 4, "as even as chance"),
        (1000, 20, 4, "more was lost than gained"),
        (1000, 4, 20, "more was gained than lost"),
    ],
)
def test_how_sure_it_is_stands_in_words(kept_, forgotten, gained, words):
    before = [1] * (kept_ + forgotten) + [0] * gained
    after = [1] * kept_ + [0] * forgotten + [1] * gained
    assert words in figures(before, after).told


def test_levels_are_told_apart_best_known_first():
    def at(level, right):
        return [Answer(f"{level}{i}", "c", "q?", ("x",), "x", r, level) for i, r in enumerate(right)]

    before = at("MaybeKnown", [True, True]) + at("HighlyKnown", [True, True, True]) + at(None, [False])
    after = at("MaybeKnown", [False, False]) + at("HighlyKnown", [True, False, True]) + at(None, [True])
    found = [(row["level"], row["known"], row["forgotten"]) for row in by_level(pair(before, after))]
    assert found == [("HighlyKnown", 3, 1), ("MaybeKnown", 2, 2)]


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
