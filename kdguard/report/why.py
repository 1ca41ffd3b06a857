"""Why a run forgot: the figures for the three hypotheses of arXiv 2604.15574, and what they say in words."""

from collections.abc import Sequence
from typing import Any

from numpy import argsort

QUARTER = 4
ENOUGH_LEARNED = 0.95  # where so much is learned, the adapter had room for it


def interference(overlaps: Sequence[float], forgotten: Sequence[bool]) -> dict[str, Any]:
    """Is what lies nearer to the training rows forgotten more? One overlap and one fate a known probe.

    `near` and `far` are the quarters of most and least overlap. `auc` is the chance that a forgotten probe lies nearer
    than a kept one, `p_value` that of the one-sided Mann-Whitney test; both None unless there are some of either.
    """
    from scipy.stats import mannwhitneyu

    order = argsort(overlaps, kind="stable")
    quarter = max(1, len(order) // QUARTER)
    lost, stayed = ([o for o, f in zip(overlaps, forgotten, strict=True) if f == fate] for fate in (True, False))
    test = mannwhitneyu(lost, stayed, alternative="greater") if lost and stayed else None
    return {
        **{
            name: _share([forgotten[i] for i in part])
            for name, part in (("near", order[-quarter:]), ("far", order[:quarter]))
        },
        "auc": float(test.statistic) / (len(lost) * len(stayed)) if test else None,
        "p_value": float(test.pvalue) if test else None,
    }


def _share(forgotten: Sequence[bool]) -> dict[str, Any]:
    return {"known": len(forgotten), "forgotten": sum(forgotten), "forgetting": sum(forgotten) / len(forgotten)}


def in_words(found: dict[str, Any]) -> dict[str, str]:
    """A sentence for each hypothesis, with the figures that it rests on."""
    near, far = (found["interference"][quarter] for quarter in ("near", "far"))
    p_value = found["interference"]["p_value"]
    quarters = (
        f"of the quarter of old questions nearest to the training rows {near['forgetting']:.1%} was forgotten, of the "
        f"farthest {far['forgetting']:.1%}"
    )
    if p_value is None:
        overlap = "nothing was forgotten" if not found["forgotten"] else "everything was forgotten: nothing to compare"
    elif p_value < 0.05:
        overlap = f"likely: {quarters} (Mann-Whitney p {_p(p_value)})"
    else:
        overlap = f"not beyond chance: {quarters} (Mann-Whitney p {_p(p_value)})"
    room = found["capacity"]
    capacity = (
        f"rank {room['rank']} has {room['parameters'] / max(room['new_facts'], 1):,.0f} parameters for each of "
        f"{room['new_facts']:,} new facts"
    )
    if room["learned"] is None:
        capacity += "; what was learned is not known"
    elif room["learned"] >= ENOUGH_LEARNED:
        capacity = f"unlikely: {capacity}, and {room['learned']:.1%} was learned"
    else:
        capacity = f"possible: {capacity}, and only {room['learned']:.1%} was learned; try a higher --rank or --epochs"
    control = found["cloning"]
    if control is None:
        cloning = "not told; kdguard explain --control trains on facts that the base knows and counts what that forgets"
    else:
        cloning = (
            f"trained on {control['trained']:,} facts that the base knew, with nothing new in them, it forgot "
            f"{control['forgetting']:.1%} of {control['known']:,} other old questions; this run forgot "
            f"{control['this_run']:.1%} of the same"
        )
        mostly = control["forgetting"] > control["this_run"] / 2
        cloning = f"{'likely' if mostly and control['this_run'] else 'unlikely'}: {cloning}"
    return {"interference": overlap, "capacity": capacity, "behaviour cloning": cloning}


def _p(value: float) -> str:
    return f"= {value:.4f}" if value >= 0.0001 else "< 0.0001"
