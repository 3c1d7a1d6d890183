"""A line over the last quarter of an hour, as SVG.

In: values and their times.  Out: a figure with a text alternative.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from attrs import frozen

from gateway.ops.ledger import LATELY
from gateway.ops.status_words import number
from gateway.ops.web.markup import Markup, element

_WIDTH, _HEIGHT = 300, 80
_GAP = 4  # above the highest value, so that its line is fully visible


@frozen
class Line:
    """A line: its name, the unit of its values, the values."""

    name: str
    unit: str
    values: Sequence[float]


def chart(line: Line, moments: Sequence[str], now: str) -> Markup:
    """Draw `line`, whose values are of `moments` (ISO 8601), up to `now`."""
    if not line.values:
        return element(
            "figure",
            element("figcaption", element("b", line.name), f" {line.unit}: no values in the first ten seconds."),
        )
    top = _round_up(max(line.values))
    end = datetime.fromisoformat(now)
    points = []
    for moment, value in zip(moments, line.values, strict=True):
        age = (end - datetime.fromisoformat(moment)).total_seconds()
        x = _WIDTH * (1 - min(max(age / LATELY, 0), 1))
        points.append((x, _HEIGHT - (_HEIGHT - _GAP) * value / top))
    shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    under = f"{points[0][0]:.1f},{_HEIGHT} {shown} {points[-1][0]:.1f},{_HEIGHT}"
    latest, highest, lowest = line.values[-1], max(line.values), min(line.values)
    told = (
        f"{line.name}, {line.unit}: now {_shown(latest)}, highest {_shown(highest)}, lowest {_shown(lowest)} "
        "in the last 15 minutes"
    )
    return element(
        "figure",
        element(
            "figcaption",
            element("b", line.name),
            " ",
            element("span", line.unit, class_="unit"),
            element("span", _shown(latest), class_="latest"),
        ),
        element(
            "svg",
            element("line", x1=0, y1=_GAP, x2=_WIDTH, y2=_GAP, class_="grid"),
            element("line", x1=0, y1=_HEIGHT, x2=_WIDTH, y2=_HEIGHT, class_="grid"),
            element("polygon", points=under, class_="under"),
            element("polyline", points=shown, class_="line"),
            viewBox=f"0 -2 {_WIDTH} {_HEIGHT + 4}",
            preserveAspectRatio="none",
            role="img",
            aria_label=told,
        ),
        element("div", element("span", "15 min ago"), element("span", f"top {_shown(top)}"), element("span", "now")),
    )


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, 50 and so on."""
    bound = 1.0
    while True:
        for step in (1, 2, 5):
            if value <= bound * step:
                return bound * step
        bound *= 10


def _shown(value: float) -> str:
    return number(value) if value >= 10 or value == int(value) else f"{value:.1f}"
