"""Why a run forgot, in figures and in words."""

import pytest
from scipy.stats import mannwhitneyu

from kdguard.report.why import in_words, interference


def test_what_is_nearer_and_forgotten_more_is_seen():
    overlaps = [i / 100 for i in range(100)]
    found = interference(overlaps, [i >= 80 for i in range(100)])
    assert found["near"] == {"known": 25, "forgotten": 20, "forgetting": 0.8}
    assert found["far"]["forgotten"] == 0
    assert found["auc"] == 1 and found["p_value"] < 1e-9
    assert found["p_value"] == pytest.approx(mannwhitneyu(overlaps[80:], overlaps[:80], alternative="greater").pvalue)


def test_what_has_nothing_to_do_with_nearness_is_not_seen():
    found = interference([i / 100 for i in range(100)], [i % 5 == 0 for i in range(100)])
    assert found["p_value"] > 0.2 and 0.4 < found["auc"] < 0.6


@pytest.mark.parametrize("fate", [True, False])
def test_with_one_fate_for_all_there_is_nothing_to_compare(fate):
    found = interference([0.1, 0.2, 0.3], [fate] * 3)
    assert found["p_value"] is None and found["auc"] is None


def explained(**changes):
    return {
        "forgotten": 20,
        "interference": interference([i / 100 for i in range(100)], [i >= 80 for i in range(100)]),
        "capacity": {"rank": 8, "parameters": 8000, "new_facts": 100, "learned": 1.0},
        "cloning": None,
    } | changes


def test_each_hypothesis_is_told_with_the_figures_it_rests_on():
    words = in_words(explained())
    assert "80.0%" in words["interference"] and "0.0%" in words["interference"]
    assert words["interference"].startswith("likely") and words["capacity"].startswith("unlikely")
    assert "80 parameters for each of 100 new facts" in words["capacity"]
    assert words["behaviour cloning"].startswith("not told")


def test_a_lesson_not_learned_may_have_had_no_room():
    words = in_words(explained(capacity={"rank": 1, "parameters": 10, "new_facts": 100, "learned": 0.4}))
    assert words["capacity"].startswith("possible") and "40.0%" in words["capacity"]


@pytest.mark.parametrize(("forgetting", "verdict"), [(0.0, "unlikely"), (0.15, "likely")])
def test_the_control_tells_what_cloning_alone_forgets(forgetting, verdict):
    control = {"trained": 100, "known": 50, "forgetting": forgetting, "this_run": 0.2}
    assert in_words(explained(cloning=control))["behaviour cloning"].startswith(verdict)
