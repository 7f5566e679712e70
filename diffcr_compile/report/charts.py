"""Line charts as inline SVG: no script, no font, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One curve. ``style`` is ``solid`` or ``dashed``: told apart without colour."""

    label: str
    values: Sequence[float]
    style: str = "solid"


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(count: int) -> list[int]:
    """Indices of the points that are drawn: evenly spaced, first and last always there."""
    if count <= MOST_POINTS:
        return list(range(count))
    last = count - 1
    return [round(i * last / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    margin = (high - low) * 0.06
    return (0.0 if low >= 0 > low - margin else low - margin), high + margin


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """Path data; ``None`` (a value that is not finite) interrupts the line, visibly.

    ``h0`` after each start makes the round line cap draw a dot where a point stands alone.
    """
    pieces, pen_down = [], False
    for point in points:
        if point is not None:
            move = f"{point[0]:.1f} {point[1]:.1f}"
            pieces.append(f"L{move}" if pen_down else f"M{move}h0")
        pen_down = point is not None
    return "".join(pieces)


def line_chart(
    name: str, steps: Sequence[int], lines: Sequence[Line], write: Callable[[float], str]
) -> Markup:
    """One chart of ``lines`` over ``steps`` (ascending), as an ``<svg>`` element.

    ``name`` is read aloud by screen readers, ``write`` makes the labels of the y axis.
    Values that are not finite leave a gap. Without any finite value the chart says so.
    """
    finite = [v for line in lines for v in line.values if math.isfinite(v)]
    if not finite or not steps:
        return Markup('<p class="note">No finite value was recorded.</p>')
    x_low, x_high = (
        (steps[0], steps[-1]) if steps[-1] > steps[0] else (steps[0] - 1, steps[0] + 1)
    )
    y_low, y_high = _span(finite)

    def x_of(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
    parts += [_y_mark(y_of(value), write(value)) for value in ticks(y_low, y_high)]
    parts.append(_x_mark(LEFT - 12, "end", "step"))
    for step in ticks(x_low, x_high):
        x = x_of(step)
        parts.append(_x_mark(x, "end" if x > WIDTH - RIGHT - 16 else "middle", f"{step:g}"))
    for line in lines:
        drawn = [
            (x_of(steps[i]), y_of(line.values[i])) if math.isfinite(line.values[i]) else None
            for i in thin(len(steps))
        ]
        parts.append(f'<path class="line {line.style}" d="{_path(drawn)}"/>')
    return Markup("".join(parts) + "</svg>")


def _y_mark(y: float, label: str) -> str:
    line = f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    return (
        line + f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _x_mark(x: float, anchor: str, label: str) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{escape(label)}</text>'
