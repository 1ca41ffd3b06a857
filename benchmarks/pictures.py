"""The pictures of the documentation, drawn from the results that the benchmarks wrote.

`python benchmarks/tables.py` writes them beside the tables. Their colours stand out on a white page and on a dark one,
and the page shows through: an image cannot know which of the two it stands on.
"""

import html
import math
from collections.abc import Callable, Sequence

from figures import OURS, PLAIN, groups, mean, read

TEXT, LINE, BAD, GOOD, MARK = "#7a828c", "#a0a7b0", "#d9534a", "#1f9d6b", "#4a84e0"
WIDTH = 720


def _text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = TEXT) -> str:
    how = f'fill="{colour}" font-size="13" text-anchor="{anchor}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {how}>{html.escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="{LINE}" stroke-width="1"/>'


def _picture(height: int, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif"><title>{html.escape(title)}</title>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def forgotten() -> str:
    """What each world forgets, plainly and with the defaults: two bars a world."""
    left, right, row = 90, 90, 58
    worlds = groups(read("retention"), "world")
    parts = []
    for i, (world, rows) in enumerate(worlds.items()):
        of, top = groups(rows, "method"), 30 + i * row
        parts.append(_text(left - 10, top + 24, world.split("-")[0], anchor="end"))
        for j, (method, colour) in enumerate(((PLAIN, BAD), (OURS, GOOD))):
            share = mean(of[method], "forgotten")
            long, y = max(2.0, share * (WIDTH - left - right)), top + j * 20
            parts.append(f'<rect x="{left}" y="{y}" width="{long:.1f}" height="16" fill="{colour}"/>')
            parts.append(_text(left + long + 6, y + 13, f"{share:.1%}", colour=colour))
    parts.append(_text(left, 16, "old facts forgotten", colour=TEXT))
    parts.append(_text(WIDTH - 10, 16, f"■ {OURS}", anchor="end", colour=GOOD))
    parts.append(_text(WIDTH - 180, 16, f"■ {PLAIN}", anchor="end", colour=BAD))
    return _picture(30 + row * len(worlds), "Old facts forgotten, by world: plain SFT beside kdguard", parts)


def methods() -> str:
    """Every method on `mixed`: what it learned across, what it forgot upwards, on a logarithmic scale."""
    left, right, top, bottom, height = 70, 20, 30, 50, 400
    floor = 0.001
    rows = groups(groups(read("retention"), "world")["mixed-names-0"], "method")

    def at(learned: float, forgot: float) -> tuple[float, float]:
        up = math.log(max(forgot, floor) / floor) / math.log(1 / floor)
        return left + learned * (WIDTH - left - right), height - bottom - up * (height - top - bottom)

    parts = [_text(left - 55, 18, "forgotten"), _text(WIDTH - right, height - 8, "learned", anchor="end")]
    for share in (0.001, 0.01, 0.1, 1.0):
        x, y = at(0, share)
        parts += [_line(x, y, WIDTH - right, y), _text(x - 8, y + 4, f"{share:.1%}", anchor="end")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at(share, floor)
        parts.append(_text(x, y + 20, f"{share:.0%}", anchor="middle"))
    named = {PLAIN: BAD, OURS: GOOD, "replay of real old facts, 1 a row": MARK, "KL, weight 12": MARK}
    for method, mine in rows.items():
        x, y = at(mean(mine, "learned"), mean(mine, "forgotten"))
        colour = named.get(method, MARK)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{7 if method in (PLAIN, OURS) else 5}" fill="{colour}">'
            f"<title>{html.escape(method)}</title></circle>"
        )
        if method in named:
            side, anchor = (-12, "end") if x > WIDTH / 2 else (12, "start")
            parts.append(_text(x + side, y + 4, method, anchor=anchor, colour=colour))
    return _picture(height, "Learned and forgotten by method, on the world `mixed`", parts)


PICTURES: dict[str, Callable[[], str]] = {"forgotten": forgotten, "methods": methods}
