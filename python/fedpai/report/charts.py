# SPDX-License-Identifier: Apache-2.0
"""Small SVG charts, drawn by hand so that a report needs no script, no font and no network.

Colours come from the page's style sheet through classes `s0` to `s7` (series) and `axis`, `grid`, `label`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files

WIDTH, HEIGHT = 560, 300
BAR_WIDTH = 1120
MARKERS = 60
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44


@dataclass(frozen=True)
class Series:
    """A line: its legend, its points, its colour class and, if known, how far each point scatters up and down."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str
    dashed: bool = False
    spread: Sequence[float] = ()


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, log_x: bool = False, from_zero: bool = True
) -> str:
    """A line chart with markers; hovering over a marker shows its numbers.

    Points that are not finite, or not positive under `log_x`, are left out. Without any point, a sentence says so.

    Args:
        log_x: a logarithmic x axis.
        from_zero: the y axis begins at 0.
    """
    drawn = [_drawable(s, log_x) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return '<p class="empty">nothing measured yet</p>'
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y + sign * d for s in drawn for (_, y), d in zip(s.points, s.spread, strict=True) for sign in (-1, 1)]
    x_ticks = log_ticks(min(xs), max(xs)) if log_x else ticks(min(0.0, *xs), max(xs))
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    across = _Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT, log_x)
    up = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_open(WIDTH, HEIGHT, f"{y_label} over {x_label}")]
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_label(LEFT - 8, y + 4, number(tick), "end"))
    for tick in x_ticks:
        x = across(tick)
        parts.append(_label(x, HEIGHT - BOTTOM + 18, number(tick)))
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_label(middle, HEIGHT - 6, x_label))
    parts.append(
        f'<text class="label" transform="translate(13 {(TOP + base) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for s in drawn:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in s.points)
        dash = ' stroke-dasharray="5 4"' if s.dashed else ""
        parts.append(f'<polyline class="line {s.style}" points="{path}"{dash}/>')
        for (x, y), d in zip(s.points, s.spread, strict=True) if len(s.points) <= MARKERS else ():
            if d:
                parts.append(
                    f'<line class="line {s.style}" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{up(y - d):.1f}" '
                    f'y2="{up(y + d):.1f}"/>'
                )
            parts.append(
                f'<circle class="dot {s.style}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3">'
                f"<title>{escape(s.label)}: {number(x)}, {number(y)}{f' ± {number(d)}' if d else ''}</title></circle>"
            )
    return "".join([*parts, "</svg>"])


def _drawable(series: Series, log_x: bool) -> Series:
    """The series with one spread a point, without the points that have no place."""
    spread = series.spread or [0.0] * len(series.points)
    kept = [
        (point, d)
        for point, d in zip(series.points, spread, strict=True)
        if all(map(math.isfinite, point)) and (point[0] > 0 or not log_x)
    ]
    return replace(series, points=[point for point, _ in kept], spread=[d for _, d in kept])


@dataclass(frozen=True)
class Bar:
    """One group of horizontal bars: a label and one value per series, None where there is none."""

    label: str
    values: Sequence[float | None]


def bar_chart(bars: Sequence[Bar], series: Sequence[tuple[str, str]], *, unit: str) -> str:
    """Grouped horizontal bars.

    Args:
        bars: groups from top to bottom.
        series: (legend, colour class) of each value of a group.
        unit: of the values.
    """
    known = [value for bar in bars for value in bar.values if value is not None and math.isfinite(value)]
    if not known:
        return '<p class="empty">nothing measured yet</p>'
    thick, gap, left = 9, 7, 8 + 7 * max(len(bar.label) for bar in bars)
    step = thick * len(series) + gap
    height = TOP + step * len(bars) + 34
    x_ticks = ticks(0.0, max(known))
    across = _Scale(0.0, x_ticks[-1], left, BAR_WIDTH - 52)
    parts = [_open(BAR_WIDTH, height, unit)]
    floor = TOP + step * len(bars)
    for tick in x_ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(_label(x, floor + 15, number(tick)))
    parts.append(_label((left + BAR_WIDTH - 52) / 2, floor + 30, unit))
    for row, bar in enumerate(bars):
        y = TOP + row * step
        middle = y + (step - gap) / 2 + 4
        parts.append(_label(left - 8, middle, bar.label, "end"))
        for place, ((legend, style), value) in enumerate(zip(series, bar.values, strict=True)):
            if value is None or not math.isfinite(value):
                continue
            top = y + place * thick
            width = max(1.0, across(value) - left)
            parts.append(
                f'<rect class="{style}" x="{left}" y="{top}" width="{width:.1f}" height="{thick - 1}" rx="2">'
                f"<title>{escape(bar.label)}, {escape(legend)}: {number(value)} {escape(unit)}</title></rect>"
                f'<text class="value" x="{left + width + 4:.1f}" y="{top + thick - 2}">{number(value)}</text>'
            )
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `wanted` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... from at or below `low` to at or above `high`, both positive; powers of ten if that is many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1, 2, 5), (1,)):
        marks = [float(f"{step}e{power}") for power in powers for step in steps]
        first = max(at for at, mark in enumerate(marks) if mark <= low)
        last = min(at for at, mark in enumerate(marks) if mark >= high)
        found = marks[first : max(last, first + 1) + 1]
        if len(found) <= 9:
            break
    return found


def number(value: float) -> str:
    """A number for human eyes: three significant digits, no trailing zeros, no exponent up to a million."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class _Scale:
    """Maps [low, high] to [start, end], linearly or by logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
            return self.start + share * (self.end - self.start)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def standalone(chart: str, legend: Sequence[tuple[str, str]]) -> str:
    """A chart as a picture of its own, in the light colours of the page, its legend below.

    Args:
        chart: what `line_chart` drew.
        legend: labels and colour classes.
    """
    head, body = chart.split(">", 1)
    rows = [legend[at : at + 2] for at in range(0, len(legend), 2)]
    height = HEIGHT + 20 * len(rows) + 8
    keys = []
    for row, pairs in enumerate(rows):
        y = HEIGHT + 14 + 20 * row
        for column, (label, style) in enumerate(pairs):
            x = LEFT + column * (WIDTH - LEFT) // 2
            keys.append(f'<line class="line {style}" x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}"/>')
            keys.append(_label(x + 27, y, label, "start"))
    sheet = files("fedpai.report").joinpath("style.css").read_text(encoding="utf-8")
    colours = sheet[sheet.index(":root") : sheet.index("}", sheet.index(":root")) + 1].replace("light dark", "light")
    rules = [line for line in sheet.splitlines() if line.startswith((".s", "svg .")) and not line.startswith(".scroll")]
    style = "\n".join([colours, "svg { font: 11.5px system-ui, sans-serif; }", *rules])
    head = head.replace(f'viewBox="0 0 {WIDTH} {HEIGHT}"', f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"')
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>'
        f'<path fill="#fff" d="M0 0h{WIDTH}v{height}h-{WIDTH}z"/>{body.removesuffix("</svg>")}{"".join(keys)}</svg>\n'
    )


def _open(width: int, height: int, title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
