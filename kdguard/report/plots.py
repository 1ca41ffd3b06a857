"""The report's pictures: SVG to stand in a page, in the page's own colours, light or dark."""

import io
import re
import threading
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kdguard.events import Event

# What matplotlib draws in -> what the page calls it.
COLOURS = {
    "#010101": "var(--text)",
    "#020202": "var(--line)",
    "#030303": "var(--mark)",
    "#040404": "var(--bad)",
    "#050505": "var(--good)",
}
TEXT, LINE, MARK, BAD, GOOD = COLOURS
_HEIGHT, _LINE, _NEAR = 3.6, 14, 36  # of the picture of runs, in inches; of a name, and of its way up, in points
_drawing = threading.Lock()  # matplotlib's settings are the whole process's


def plot_training(losses: Sequence[Event], sampled: Sequence[Event], width: float = 8) -> str:
    """Cross-entropy of each step, in a guarded run its KL to the teacher, and what was learned and kept on the way.

    width: of the picture in inches; the narrower, the larger its text on the page.
    """
    drawn = {"ce": "cross-entropy, nats", "kl": "KL to teacher, nats"}
    if not any(event["kl"] for event in losses):
        del drawn["kl"]
    figure, rows = _figure(len(drawn) + bool(sampled), width=width)
    for axes, (key, label) in zip(rows, drawn.items(), strict=False):
        axes.plot([event["step"] for event in losses], [event[key] for event in losses], color=MARK)
        axes.set_ylabel(label)
    if sampled:
        steps = [event["step"] for event in sampled]
        for key, of, colour, marker in (("learned", "new", MARK, "o"), ("kept", "known", GOOD, "s")):
            shares = [event[key] / max(event[of], 1) for event in sampled]
            rows[-1].plot(steps, shares, color=colour, marker=marker, label=f"{key}, of {sampled[-1][of]} asked")
        rows[-1].yaxis.set_major_formatter(PercentFormatter(1))
        rows[-1].legend(frameon=False, labelcolor=TEXT, loc="lower right")
    rows[-1].set_xlabel("step")
    return _svg(figure, "losses, learned and kept by step")


def plot_watched(watched: Sequence[Event]) -> str:
    """Forgetting on the watched probes after each epoch, above the guard's weight in it."""
    figure, (above, below) = _figure(2)
    steps = [event["step"] for event in watched]
    above.plot(steps, [event["forgotten"] / max(event["known"], 1) for event in watched], color=BAD, marker="o")
    above.yaxis.set_major_formatter(PercentFormatter(1))
    above.set_ylabel("watched, forgotten")
    below.step([0, *steps], [event["weight"] for event in (watched[0], *watched)], color=MARK)
    below.set_ylabel("guard's weight")
    below.set_xlabel("step")
    return _svg(figure, "forgetting on the watched probes and the guard's weight, by step")


def plot_dial(points: Sequence[dict[str, Any]], strength: float) -> str:
    """Learned and forgotten at each strength of the adapter; a line marks the one it has."""
    figure, (above, below) = _figure(2)
    strengths = [point["strength"] for point in points]
    above.plot(strengths, [point["learned"] for point in points], color=GOOD, marker="o")
    above.set_ylabel("learned")
    below.plot(strengths, [point["forgetting"] or 0.0 for point in points], color=BAD, marker="o")
    below.set_ylabel("forgotten")
    below.set_xlabel("strength of the adapter")
    for axes in (above, below):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.axvline(strength, color=TEXT, linestyle=":")
    return _svg(figure, "learned and forgotten by the strength of the adapter")


def plot_runs(points: Sequence[tuple[str, float, float]], width: float = 8) -> str:
    """Runs by what they learned and forgot, each with its name: the best lie at the lower right.

    width: as in plot_training. A name that would not stand near its point is left out.
    """
    figure, [axes] = _figure(1, height=_HEIGHT, width=width)
    least = min(0.5, *(learned for _, learned, _ in points)) - 0.02
    most = max(0.02, 1.15 * max(forgetting for *_, forgetting in points))
    names: dict[tuple[float, float], list[str]] = {}
    for name, learned, forgetting in points:
        names.setdefault((learned, forgetting), []).append(name)
    free = {"left": 0.0, "right": 0.0}  # how high, in points, the names on that side already reach
    for place, here in sorted(names.items(), key=lambda each: each[0][1]):
        axes.scatter(*place, color=MARK, clip_on=False, zorder=3)
        side = "left" if place[0] < (least + 1) / 2 else "right"
        height = place[1] / most * _HEIGHT * 72
        rise = max(6, free[side] - height)
        if rise < _NEAR:
            free[side] = height + rise + _LINE
            axes.annotate(
                ", ".join(here),
                place,
                (6 if side == "left" else -6, rise),
                textcoords="offset points",
                ha=side,
                color=TEXT,
                parse_math=False,
            )
    for axis, label in ((axes.xaxis, "learned"), (axes.yaxis, "forgotten")):
        axis.set_major_formatter(PercentFormatter(1))
        axis.set_label_text(label)
    axes.set_xlim(least, 1.02)
    axes.set_ylim(top=most)
    return _svg(figure, "learned and forgotten by run")


def _figure(rows: int, height: float = 1.8, width: float = 8) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, sharex=True, squeeze=False).flat)
    for each in axes:
        each.grid(color=LINE, linewidth=0.8)
        each.tick_params(colors=TEXT, length=0)
        for part in (each.xaxis.label, each.yaxis.label):
            part.set_color(TEXT)
        for spine in each.spines.values():
            spine.set_visible(False)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    for axes in figure.axes:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-6))
    text = io.StringIO()
    with _drawing, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=none)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text.getvalue())  # a page needs none
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    for drawn, named in COLOURS.items():
        svg = svg.replace(drawn, named)
    return svg
