"""Line charts as SVG, by hand: a plotting library would be ten packages for three pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 130, 44, 44
TEXT, GRID = "#555555", "#e6e6e6"

Tick = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) in order of x, and the name that stands beside the last one."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


def chart(
    title: str, lines: Sequence[Line], *, x_label: str, x_ticks: Sequence[Tick], log: bool = False
) -> str:
    """An SVG of the lines. `log`: the y axis grows by factors, else it begins at zero."""
    heights = [y for line in lines for _, y in line.points]
    y_ticks = _factors(min(heights), max(heights)) if log else steps(max(heights))
    y_ends = math.log(y_ticks[0]) if log else 0.0, math.log(y_ticks[-1]) if log else y_ticks[-1]
    across = _scale(x_ticks[0][0], x_ticks[-1][0], LEFT + 12, WIDTH - RIGHT)
    down = _scale(*y_ends, HEIGHT - BOTTOM, TOP + 8)

    def place(y: float) -> float:
        return down(math.log(y) if log else y)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT - 40, 22, title, colour="#222222", size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, anchor="middle"),
    ]
    for y in y_ticks:
        parts.append(
            f'<path d="M{LEFT} {place(y):.1f}H{WIDTH - RIGHT + 8}" stroke="{GRID}"/>'
            + _text(LEFT - 8, place(y) + 4, f"{y:,g}", anchor="end")
        )
    for x, label in x_ticks:
        parts.append(_text(across(x), HEIGHT - BOTTOM + 18, label, anchor="middle"))
    for line in lines:
        points = [(across(x), place(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>' for x, y in points
        ]
        x, y = points[-1]
        parts.append(_text(x + 10, y + 4, line.name, colour=line.colour, weight="bold"))
    return "\n".join([*parts, "</svg>", ""])


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def steps(highest: float) -> list[float]:
    """Round numbers from zero to the first that is not below the highest."""
    rough = highest / 5
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    return [number * step for number in range(math.ceil(highest / step) + 1)]


def _factors(lowest: float, highest: float) -> list[float]:
    """1, 2, 5, 10 …: those between which all values lie."""
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    all_of_them = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    start = max(tick for tick in all_of_them if tick <= lowest)
    end = min(tick for tick in all_of_them if tick >= highest)
    return [tick for tick in all_of_them if start <= tick <= end]


def _text(
    x: float,
    y: float,
    text: str,
    *,
    colour: str = TEXT,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"'
        f' font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )
