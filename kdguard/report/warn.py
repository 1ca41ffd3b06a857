"""What a reader must not take from a run's figures, in words: nothing was learned, or few probes tell forgetting."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, variance

from kdguard.events import read_events
from kdguard.report.figures import Learned, share_interval

TOLD = 0.01  # forgetting that known probes should be able to tell from none
LEAST = 4  # steps of which a change of the cross-entropy can be told


def few_known(known: int, n: int) -> list[str]:
    """Of `n` probes the base answers only `known` rightly: too few, or the lesser part."""
    if not known:
        return [f"the base answers none of the {n:,} probes rightly, so forgetting cannot be told; --probes it knows"]
    _, most = share_interval(0, known) or (0.0, 1.0)
    wide = f"were 0 of them forgotten, up to {most:.1%} could still be (95 % interval)"
    if known < n / 2:
        return [
            f"the base answers only {known:,} of {n:,} probes rightly ({known / n:.0%}), so forgetting is told from "
            f"those few: {wide}; --probes with questions it knows"
        ]
    if most > TOLD:
        return [f"forgetting is told from only {known:,} known probes: {wide}; more --probes make it narrower"]
    return []


def nothing_learned(new: Learned, ces: Sequence[float], goal: str) -> list[str]:
    """The training left the cross-entropy, or the share of training questions that are answered, where it was.

    ces: cross-entropy of each step, in nats. Style is not learned by answering, and where all is known from the start
    nothing is left to be learned.
    """
    first, last, falls = _fell(ces)
    told = f"the cross-entropy {'fell' if falls else 'did not clearly fall'}, from {first:.3f} to {last:.3f} nats"
    risen = not new.n or goal == "style" or new.after > new.before or new.before == 1
    found = []
    if not risen:
        right = f"{new.before:.1%} of {new.n:,} training questions before, {new.after:.1%} after"
        found.append(f"nothing was learned that the training questions could tell: {right}")
        if ces:
            found[0] += f"; {told}"
        if falls:
            found[0] += ", so the answers may be too long to be matched word for word"
        else:
            found[0] += "; more --epochs or a higher --lr"
    elif len(ces) >= LEAST and not falls:
        found.append(f"{told}: hardly anything was learned; more --epochs or a higher --lr")
    return found


def ces_in(path: Path) -> list[float]:
    """The cross-entropy of each step in a run's events; of a step that a resumed run came to again, the last."""
    return list({event["step"]: event["ce"] for event in read_events(path) if event["event"] == "loss"}.values())


def _fell(ces: Sequence[float]) -> tuple[float, float, bool]:
    """The mean over the first and the last quarter of the steps, and whether the fall is more than two standard errors.

    Within a quarter the cross-entropy falls as well, which makes the error larger: what is told to fall does.
    """
    if len(ces) < LEAST:
        return (ces[0], ces[-1], ces[-1] < ces[0]) if ces else (0.0, 0.0, False)
    n = max(2, len(ces) // 4)
    first, last = ces[:n], ces[-n:]
    error = ((variance(first) + variance(last)) / n) ** 0.5
    return mean(first), mean(last), mean(first) - mean(last) > 2 * error
