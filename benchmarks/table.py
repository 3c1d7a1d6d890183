"""Counts of all rounds as one table.

In: the counts of each round, measurement and relay.  Out: Markdown that can be read as it is, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.measurements import DIRECT, Counts, Figure, Measurement, system_call_figures

Round = dict[str, dict[str, Counts]]


def render(
    measurements: Sequence[Measurement], relays: Sequence[str], rounds: Sequence[Round], bases: Sequence[str] = ()
) -> str:
    """Return the table: medians over the rounds, with the least and the greatest value where there are several.

    Figures that are compared with other relays' are compared with those of `bases`, too.
    """
    rows = [["", "unit", *relays]]
    for measurement in measurements:
        results = [results[measurement.name] for results in rounds if measurement.name in results]
        if not results:
            continue
        rows.append([f"**{measurement.title}**", "", *("" for _ in relays)])
        figures = measurement.figures
        if measurement.group == "syscalls":
            figures += system_call_figures(results)
        for figure in figures:
            rows.append(_row(figure.label, figure.unit, relays, results, _value_of(figure)))
            for base in (*figure.against, *bases) if figure.against else ():
                # A ratio to oneself alone says nothing.
                if base in relays and len(set(relays) - {DIRECT}) > 1:
                    rows += [_row(f"{figure.label} / {base}'s", "ratio", relays, results, _ratio_of(figure, base))]
    return _aligned(rows)


_Value = Callable[[dict[str, Counts], str], float]


def _value_of(figure: Figure) -> _Value:
    def value(results: dict[str, Counts], relay: str) -> float:
        return figure.of(results[relay], results.get(DIRECT, {}))

    return value


def _ratio_of(figure: Figure, base: str) -> _Value:
    """Within one round, whose measurements stand close together in time."""
    value = _value_of(figure)

    def ratio(results: dict[str, Counts], relay: str) -> float:
        if relay == DIRECT:
            raise LookupError
        own, others = value(results, relay), value(results, base)
        # What a noisy machine has made negative is nothing to compare with.
        if own < 0 or others <= 0:
            raise LookupError
        return own / others

    return ratio


def _row(label: str, unit: str, relays: Sequence[str], rounds: Sequence[dict[str, Counts]], of: _Value) -> list[str]:
    return [label, unit, *(_cell(relay, rounds, of) for relay in relays)]


def _cell(relay: str, rounds: Sequence[dict[str, Counts]], of: _Value) -> str:
    values = []
    for results in rounds:
        if "failed" in results.get(relay, {}):
            return "failed"
        try:
            values.append(of(results, relay))
        except (LookupError, ZeroDivisionError):
            continue
    if not values:
        return "-"
    if len(values) == 1:
        return number(values[0])
    return f"{number(median(values))} ({number(min(values))}..{number(max(values))})"


def number(value: float) -> str:
    """Return three significant digits, all digits before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
