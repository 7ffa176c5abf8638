"""`data_scale_comparison.png`: scores and cost along the axis of numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.collect.axes import Axis, Matrix
from baton.collect.figure import COLOURS, DASHES, MARKERS, Frame, Text, lighter, shortened, style
from baton.collect.gather import Result
from baton.collect.measures import Measure, measures
from baton.collect.plots import (
    INTERVALS,
    Drawing,
    Heading,
    columns_for,
    error_bars,
    left_out,
    missing_tasks,
    names_of,
    plain_numbers,
    renamed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 12


@dataclass(frozen=True, kw_only=True)
class _Series:
    name: str
    colour: str
    marker: str
    dash: str
    results: list[Result]


def draw_scale(heading: Heading, matrix: Matrix, results: Sequence[Result]) -> Drawing:
    """Scores and cost along the axis of numbers, one line for each choice of the others."""
    axis = matrix.scale
    if axis is None or axis.values is None:
        found = "; ".join(f"{axis.name}: {', '.join(axis.labels[:5])}" for axis in matrix.axes)
        return Drawing(
            png=None, reason=f"the matrix has no axis of numbers ({found or 'it has no axes'})"
        )
    shown = [result for result in results if axis.name in result.task.labels]
    panels = measures(shown)
    if not panels:
        return Drawing(png=None, reason="no task has a result yet")
    with style():
        text = Text(names_of(matrix))
        every = _series(matrix, shown, text)
        lines = [line for line in every if any(result.record for result in line.results)][:LINES]
        beyond = sum(any(r.record for r in line.results) for line in every) - len(lines)
        caption = [INTERVALS, missing_tasks(shown), left_out(beyond, "lines"), renamed(text)]
        columns = columns_for(len(panels)) if len(lines) <= 6 else 2
        frame = Frame(
            len(panels),
            columns,
            title=text.plain(heading.title(f"scores and cost by {text(axis.name)}")),
            notice=text.plain(heading.notice),
            caption=" ".join(filter(None, caption)),
            panel_height=3.1,
            legend=[(_handle(line), line.name) for line in lines if line.name],
        )
        for axes, measure in zip(frame.axes, panels, strict=True):
            _draw_lines(axes, measure, axis, lines, text)
        return Drawing(
            png=frame.png(),
            alt=f"{', '.join(panel.title for panel in panels)} against {axis.name}",
            renamed=text.replaced,
        )


def _series(matrix: Matrix, results: Sequence[Result], text: Text) -> list[_Series]:
    """Tasks by their labels on every axis but the scale; colour by the first of these axes."""
    others = matrix.others
    grouped: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        key = tuple(result.task.labels.get(axis.name, "") for axis in others)
        grouped.setdefault(key, []).append(result)
    firsts = {first: i for i, first in enumerate(dict.fromkeys(key[:1] for key in grouped))}
    rests = {rest: i for i, rest in enumerate(dict.fromkeys(key[1:] for key in grouped))}
    # One hue for each label of the first axis, shades and markers for the other axes; where
    # that does not reach, one look after the other.
    by_axis = len(firsts) <= len(COLOURS) and len(rests) <= len(MARKERS) - 1
    series = []
    for index, (key, members) in enumerate(grouped.items()):
        first, rest = (firsts[key[:1]], rests[key[1:]]) if by_axis else (index, 0)
        shade = 0.6 * rest / max(1, len(rests) - 1)
        series.append(
            _Series(
                name=", ".join(text(label, 24) for label in key if label),
                colour=lighter(COLOURS[first % len(COLOURS)], shade),
                marker=MARKERS[(first + rest) % len(MARKERS)],
                dash=DASHES[first // len(COLOURS) % len(DASHES)],
                results=members,
            )
        )
    return series


def _draw_lines(
    axes: Axes, measure: Measure, axis: Axis, lines: Sequence[_Series], text: Text
) -> None:
    assert axis.values is not None
    numbers = [axis.values[label] for label in axis.labels]
    logarithmic = min(numbers) > 0 and max(numbers) >= 5 * min(numbers)
    if logarithmic:
        axes.set_xscale("log")
    places = [math.log(number) for number in numbers] if logarithmic else numbers
    span = (max(places) - min(places)) or 1.0
    closest = min((high - low for low, high in itertools.pairwise(places)), default=span)
    for index, line in enumerate(lines):
        # Side by side, or equal values and their intervals would hide each other.
        shift = (index - (len(lines) - 1) / 2) * min(0.014 * span, 0.6 * closest / len(lines))
        # A task without a result is a gap in its line.
        points = sorted(
            (axis.values[r.task.labels[axis.name]], measure.find(r)) for r in line.results
        )
        x = [
            math.exp(math.log(number) + shift) if logarithmic else number + shift
            for number, _ in points
        ]
        found = [value for _, value in points]
        y = [value.value if value else math.nan for value in found]
        axes.errorbar(
            x,
            y,
            yerr=error_bars(found),
            color=line.colour,
            marker=line.marker,
            linestyle=line.dash,
            markersize=6,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=3,
        )
    _place_ticks(axes, axis, places, logarithmic, text)
    axes.set_title(shortened(text.plain(measure.title), 44), loc="left")
    axes.set_ylabel(measure.unit)
    plain_numbers(axes)
    axes.margins(y=0.12)
    if measure.from_zero:
        # Margins are parts of the range of the data, which is nothing if all are alike.
        axes.set_ylim(0, 1.12 * float(axes.dataLim.y1) or 1)


def _place_ticks(
    axes: Axes, axis: Axis, places: Sequence[float], logarithmic: bool, text: Text
) -> None:
    """One tick for each number of the axis, as far as their labels keep clear of each other."""
    assert axis.values is not None
    low, high = min(places), max(places)
    span = (high - low) or 1.0
    kept: list[tuple[float, str]] = []
    for place, label in zip(places, axis.labels, strict=True):
        room = 0.024 * span * (min(12, len(label)) + 2)
        if not kept or place - kept[-1][0] >= room:
            kept.append((place, label))
    back = math.exp if logarithmic else float
    # The points of a single place would be a range of nothing, of which matplotlib warns.
    axes.set_autoscalex_on(False)
    axes.set_xticks([back(place) for place, _ in kept], [text(label, 12) for _, label in kept])
    axes.set_xticks([], minor=True)
    axes.set_xlim(back(low - 0.1 * span), back(high + 0.1 * span))
    axes.set_xlabel(f"{text(axis.name)}{' (log scale)' if logarithmic else ''}")


def _handle(line: _Series) -> Any:
    from matplotlib.lines import Line2D

    dash: Any = line.dash
    return Line2D([], [], color=line.colour, marker=line.marker, linestyle=dash, linewidth=1.8)
