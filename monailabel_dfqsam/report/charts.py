"""Curves and ranges as coordinates that the template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MAX_CURVE_POINTS = 200
RANGE_WIDTH = 320  # SVG units of a layer's strip
RANGE_LINE = 7  # SVG units from one kind's bar to the next


@dataclass(frozen=True)
class Series:
    """One polyline: `points` in SVG's own notation, `dots` the same as (x, y) pairs or empty."""

    name: str
    colour: int
    points: str
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in SVG units."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A small line chart in SVG units, y downwards."""

    title: str
    series: Sequence[Series]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    legend: bool
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


@dataclass(frozen=True)
class Bar:
    """One range within a strip, in SVG units; `title` says its ends."""

    x: float
    y: float
    width: float
    colour: int
    title: str


@dataclass(frozen=True)
class RangeStrip:
    """The ranges of what one layer reads, a bar a kind of image, one below the other on a common scale.

    Attributes:
        zero: where the value 0 lies, in SVG units.
        low: least value of the strip, as text.
        high: greatest value of the strip, as text.
    """

    name: str
    bars: Sequence[Bar]
    zero: float
    low: str
    high: str
    height: int


def line_chart(
    title: str, curves: Mapping[str, Sequence[float]], colours: Sequence[int], *, dots: bool
) -> Chart:
    """Curves over 0, 1, 2 …, a colour each; values that are not finite are left out."""
    width, height = (640, 240) if dots else (340, 180)
    left, right, top, bottom = 52, width - 12, 12, height - 24
    values = [v for curve in curves.values() for v in curve if math.isfinite(v)] or [0.0]
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    last = max(max(len(curve) for curve in curves.values()) - 1, 1)

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * index / last
        return round(x, 1), round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    series = []
    for colour, (name, curve) in zip(colours, curves.items(), strict=True):
        places = [place(i, curve[i]) for i in spread(len(curve), MAX_CURVE_POINTS) if math.isfinite(curve[i])]
        points = " ".join(f"{x},{y}" for x, y in places)
        series.append(Series(name.replace("_", " "), colour, points, places if dots else ()))
    return Chart(
        title,
        series,
        x_ticks=[Tick(place(i, low)[0], str(i)) for i in _x_ticks(last, dots)],
        y_ticks=[Tick(place(0, value)[1], f"{value:.3g}") for value in (low, (low + high) / 2, high)],
        legend=len(curves) > 1,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
    )


def range_strip(name: str, ranges: Sequence[tuple[float, float]], colours: Sequence[int]) -> RangeStrip:
    """A layer's ranges as bars over the span of all of them and of 0."""
    low = min(0.0, *(low for low, _ in ranges))
    high = max(0.0, *(high for _, high in ranges))
    scale = RANGE_WIDTH / max(high - low, 1e-12)
    bars = [
        Bar(
            round((start - low) * scale, 1),
            RANGE_LINE * line,
            round(max((end - start) * scale, 1.0), 1),
            colour,
            f"{start:.3g} … {end:.3g}",
        )
        for line, ((start, end), colour) in enumerate(zip(ranges, colours, strict=True))
    ]
    return RangeStrip(
        name, bars, round(-low * scale, 1), f"{low:.2g}", f"{high:.2g}", RANGE_LINE * len(ranges)
    )


def spread(count: int, most: int) -> list[int]:
    """At most `most` different indices below `count`, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _x_ticks(last: int, each: bool) -> Iterable[int]:
    if each and last <= 12:
        return range(last + 1)
    return sorted({0, last // 2, last})
