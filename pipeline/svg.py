"""Small plots as inline SVG, to stand in a page that brings the styles: colours are its variables, so that light and
dark are its business. Coordinates are in pixels; text is large enough to be read where a plot is shown that small."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Series(NamedTuple):
    """One line of a plot: its points (x, y), each with an interval or not."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float] | None] = ()


_SHAPES = ("circle", "square", "diamond")
"""Lines differ by the shape of their points, too: not everybody sees colours."""


def bar(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A share as a horizontal bar, with its interval as a whisker. As wide as what it stands in."""
    if value is None:
        return ""
    parts = [f'<rect class="bar" x="0" y="3" width="{_n(100 * value)}" height="8" rx="1.5"/>']
    if low is not None and high is not None:
        from_, to = _n(100 * low), _n(100 * high)
        parts.append(f'<path class="whisker" d="M{from_} 7H{to}M{from_} 4v6M{to} 4v6"/>')
    box = 'viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="barplot" {box}>{"".join(parts)}</svg>'


def reliability(said: Sequence[float], found: Sequence[float], title: str) -> str:
    """What was said against what was found: on the diagonal a model is as good as it says; each point's distance from
    it is drawn."""
    size, left, top = 150.0, 44.0, 8.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + size * x, top + size * (1 - y)

    parts = [_grid(left, top, size, size)]
    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    parts.append(f'<path class="ideal" d="M{_n(x0)} {_n(y0)}L{_n(x1)} {_n(y1)}"/>')
    for x, y in zip(said, found, strict=True):
        (px, py), (_, ideal) = at(x, y), at(x, x)
        parts.append(f'<path class="miss" d="M{_n(px)} {_n(py)}V{_n(ideal)}"/>')
    places = [at(x, y) for x, y in zip(said, found, strict=True)]
    parts.append(_line(places, 0))
    parts += [_dot(x, y, 0) for x, y in places]
    parts += [_text(left - 5, top + size * (1 - v) + 4, f"{v:g}", "end") for v in (0, 0.5, 1)]
    parts += [_text(left + size * v, top + size + 15, f"{v:g}", "middle") for v in (0, 0.5, 1)]
    parts.append(_text(left + size / 2, top + size + 30, "confidence", "middle"))
    parts.append(_text(11, top + size / 2, "right", "middle", turned=True))
    return _svg(left + size + 10, top + size + 36, parts, title)


def curves(series: Sequence[Series], steps: Sequence[str], floor: float | None, title: str) -> str:
    """Shares over steps of equal distance: a line each, what they all begin with at the left, and ``floor`` as a dashed
    line across."""
    width, height, left, top = 190.0, 130.0, 42.0, 8.0
    right = max(len(steps) - 1, 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + 6 + (width - 12) * x / right, top + height * (1 - y)

    parts = [_grid(left, top, width, height)]
    if floor is not None:
        y = at(0, floor)[1]
        parts.append(f'<path class="floor" d="M{_n(left)} {_n(y)}h{_n(width)}"/>')
    for i, one in enumerate(series):
        places = [at(x, y) for x, y in one.points]
        for (x, _), interval in zip(one.points, one.intervals, strict=False):
            if interval is not None:
                (px, low), (_, high) = at(x, interval[0]), at(x, interval[1])
                parts.append(f'<path class="interval s{i}" d="M{_n(px + 3 * (i - 1))} {_n(low)}V{_n(high)}"/>')
        parts.append(_line(places, i))
        parts += [_dot(x, y, i) for x, y in places]
    parts += [_text(left - 5, top + height * (1 - v) + 4, f"{v:.0%}", "end") for v in (0, 0.5, 1)]
    parts += [_text(at(i, 0)[0], top + height + 16, step, "middle") for i, step in enumerate(steps)]
    return _svg(left + width + 22, top + height + 24, parts, title)


def key(i: int) -> str:
    """The point of the line ``i``, for a legend."""
    drawn = _line([(1, 6), (23, 6)], i) + _dot(12, 6, i)
    return f'<svg class="key" viewBox="0 0 24 12" aria-hidden="true">{drawn}</svg>'


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    words = escape(title)
    return (f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{words}"><title>{words}</title>'
            f'{"".join(parts)}</svg>')  # fmt: skip


def _grid(left: float, top: float, width: float, height: float) -> str:
    lines = "".join(f"M{_n(left)} {_n(top + height * k / 4)}h{_n(width)}" for k in range(5))
    return f'<path class="grid" d="{lines}"/>'


def _line(places: Sequence[tuple[float, float]], i: int) -> str:
    points = "L".join(f"{_n(x)} {_n(y)}" for x, y in places)
    return f'<path class="line s{i}" d="M{points}"/>' if places else ""


def _dot(x: float, y: float, i: int) -> str:
    shape = _SHAPES[i % len(_SHAPES)]
    if shape == "circle":
        return f'<circle class="dot s{i}" cx="{_n(x)}" cy="{_n(y)}" r="3.2"/>'
    turn = f' transform="rotate(45 {_n(x)} {_n(y)})"' if shape == "diamond" else ""
    return f'<rect class="dot s{i}" x="{_n(x - 2.8)}" y="{_n(y - 2.8)}" width="5.6" height="5.6"{turn}/>'


def _text(x: float, y: float, words: str, anchor: str, *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
