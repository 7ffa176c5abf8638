"""The three plots of an experiment, for any matrix: along its scale, by choice, and over steps.

Each function returns a `Drawing`: PNG bytes, or none and the reason why there is nothing to
draw. What does not fit legibly is left out, and the caption says how much that is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from baton.collect.axes import Axis, Matrix
from baton.collect.figure import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    QUIET,
    Frame,
    Text,
    lighter,
    style,
)
from baton.collect.gather import Result
from baton.collect.measures import Measure, Value, measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 12
BARS = 60
CURVES = 48
_TRAIN = lighter(COLOURS[0], 0.5)
_DEV = COLOURS[1]
_INTERVALS = "Error bars: 95 % bootstrap intervals over the test rows, where the record has them."


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What stands above every plot."""

    experiment: str
    digest: str
    notice: str

    def title(self, what: str) -> str:
        return f"{self.experiment}/{self.digest}: {what}"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A plot as PNG, or the reason why there is none; `alt` describes it to who cannot see it.

    `renamed` maps names that the plot's font cannot draw to what stands for them.
    """

    png: bytes | None
    alt: str = ""
    reason: str = ""
    renamed: dict[str, str] = field(default_factory=dict)


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
        axes = "; ".join(f"{axis.name}: {', '.join(axis.labels[:5])}" for axis in matrix.axes)
        return Drawing(
            png=None, reason=f"the matrix has no axis of numbers ({axes or 'it has no axes'})"
        )
    shown = [result for result in results if axis.name in result.task.labels]
    panels = measures(shown)
    if not panels:
        return Drawing(png=None, reason="no task has a result yet")
    with style():
        text = Text(_names(matrix))
        every = _series(matrix, shown, text)
        lines = [line for line in every if any(result.record for result in line.results)][:LINES]
        left_out = sum(any(r.record for r in line.results) for line in every) - len(lines)
        caption = [_INTERVALS, _missing(shown), _left_out(left_out, "lines"), _renamed(text)]
        columns = _columns(len(panels)) if len(lines) <= 6 else 2
        frame = Frame(
            len(panels),
            columns,
            title=heading.title(f"scores and cost by {text(axis.name)}"),
            notice=_drawable(heading.notice, text),
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


def draw_methods(heading: Heading, matrix: Matrix, results: Sequence[Result]) -> Drawing:
    """Scores and cost as bars, coloured by the first axis that is a choice."""
    panels = measures(results)
    if not panels:
        return Drawing(png=None, reason="no task has a result yet")
    axis = _coloured_axis(matrix)
    others = [other for other in matrix.axes if other is not axis]
    with style():
        text = Text(_names(matrix))
        groups: dict[str, list[Result]] = {}
        for result in results:
            labels = result.task.labels
            name = ", ".join(
                text(labels[other.name], 18) for other in others if other.name in labels
            )
            groups.setdefault(name, []).append(result)
        groups = {name: group for name, group in groups.items() if any(r.record for r in group)}
        colours = dict(zip(axis.labels, COLOURS, strict=False)) if axis else {}
        fit = max(1, BARS // max(1, len(colours)))
        shown = dict(itertools.islice(groups.items(), fit))
        wide = len(shown) * max(1, len(colours)) > 24
        grouped_by = ", ".join(text(other.name) for other in others)
        left_out = len(groups) - len(shown)
        caption = [_INTERVALS, _missing(results), _left_out(left_out, "groups"), _renamed(text)]
        columns = 1 if wide else _columns(len(panels))
        frame = Frame(
            len(panels),
            columns,
            title=heading.title(f"scores and cost by {text(axis.name) if axis else 'task'}"),
            notice=_drawable(heading.notice, text),
            caption=" ".join(filter(None, caption)),
            panel_height=2.0 if wide else 3.1,
            legend=[(_patch(colour), text(label)) for label, colour in colours.items()],
        )
        for index, (axes, measure) in enumerate(zip(frame.axes, panels, strict=True)):
            _draw_bars(axes, measure, axis, shown, colours)
            last = index >= len(panels) - columns
            _label_groups(axes, list(shown), grouped_by, hidden=wide and not last)
        return Drawing(
            png=frame.png(),
            alt=f"{', '.join(panel.title for panel in panels)} as bars"
            + (f", coloured by {axis.name}" if axis else ""),
            renamed=text.replaced,
        )


def draw_curves(heading: Heading, results: Sequence[Result]) -> Drawing:
    """Train and dev loss over the steps, one panel a task, all on one loss axis."""
    curved = [result for result in results if len(result.train_curve) or len(result.dev_curve)]
    if not curved:
        return Drawing(png=None, reason="no task has logged a loss yet")
    shown = curved[:CURVES]
    with style():
        text = Text([result.name for result in results])
        small = len(shown) > 12
        columns = 6 if len(shown) > 24 else 4 if len(shown) > 6 else min(3, len(shown))
        without = len(results) - len(curved)
        caption = [
            f"{without} tasks have no curve yet." if without else "",
            f"{len(curved) - len(shown)} more tasks are left out here."
            * (len(curved) > len(shown)),
            _renamed(text),
        ]
        frame = Frame(
            len(shown),
            columns,
            title=heading.title("train and dev loss"),
            notice=_drawable(heading.notice, text),
            caption=" ".join(filter(None, caption)),
            panel_height=1.8 if small else 2.5 if columns == 4 else 3.0 if columns > 1 else 5.0,
            legend=_curve_legend(),
            share=True,
        )
        for index, (axes, result) in enumerate(zip(frame.axes, shown, strict=True)):
            _draw_curve(axes, result, text, narrow=columns == 6)
            if index % columns == 0:
                axes.set_ylabel("loss")
            if index >= len(shown) - columns:
                axes.set_xlabel("step")
        _share_loss_axis(frame.axes[0], shown)
        return Drawing(
            png=frame.png(),
            alt=f"Train and dev loss over steps of {len(shown)} tasks",
            renamed=text.replaced,
        )


def _names(matrix: Matrix) -> list[str]:
    """Every name in the plots, in an order that gives each the same `#number` in both."""
    return [name for axis in matrix.axes for name in (axis.name, *axis.labels)]


def _drawable(notice: str, text: Text) -> str:
    """The notice without what the font cannot draw; the page has it in full."""
    return "".join(c if not Text([c]).replaced else "?" for c in notice) if notice else ""


def _columns(panels: int) -> int:
    return 2 if panels in (2, 4) else min(3, panels)


def _missing(results: Sequence[Result]) -> str:
    missing = sum(result.record is None for result in results)
    return f"{missing} of {len(results)} tasks have no result and are not drawn." if missing else ""


def _renamed(text: Text) -> str:
    return "A # and a number is a name that this font cannot draw." if text.replaced else ""


def _left_out(count: int, what: str) -> str:
    return f"{count} more {what} are left out here; results_summary.csv has all." if count else ""


def _series(matrix: Matrix, results: Sequence[Result], text: Text) -> list[_Series]:
    """Tasks by their labels on every axis but the scale; colour by the first of these axes."""
    others = matrix.others
    grouped: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        key = tuple(result.task.labels.get(axis.name, "") for axis in others)
        grouped.setdefault(key, []).append(result)
    firsts = list(dict.fromkeys(key[:1] for key in grouped))
    rests = list(dict.fromkeys(key[1:] for key in grouped))
    # One hue for each label of the first axis, shades and markers for the other axes; where
    # that does not reach, one look after the other.
    by_axis = len(firsts) <= len(COLOURS) and len(rests) <= len(MARKERS) - 1
    series = []
    for index, (key, members) in enumerate(grouped.items()):
        first, rest = (firsts.index(key[:1]), rests.index(key[1:])) if by_axis else (index, 0)
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
            yerr=_bars_of(found),
            color=line.colour,
            marker=line.marker,
            linestyle=line.dash,
            markersize=6,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=3,
        )
    _place_ticks(axes, axis, places, logarithmic, text)
    axes.set_title(measure.title, loc="left")
    axes.set_ylabel(measure.unit)
    _plain_numbers(axes)
    axes.margins(y=0.12)
    if measure.from_zero:
        axes.set_ylim(bottom=0)


def _place_ticks(
    axes: Axes, axis: Axis, places: Sequence[float], logarithmic: bool, text: Text
) -> None:
    """One tick for each number of the axis, as far as their labels keep clear of each other."""
    assert axis.values is not None
    low, high = min(places), max(places)
    span = (high - low) or 1.0
    kept: list[tuple[float, str]] = []
    for place, label in zip(places, axis.labels, strict=True):
        room = 0.018 * span * (min(12, len(label)) + 2)
        if not kept or place - kept[-1][0] >= room:
            kept.append((place, label))
    back = math.exp if logarithmic else float
    axes.set_xticks([back(place) for place, _ in kept], [text(label, 12) for _, label in kept])
    axes.set_xticks([], minor=True)
    axes.set_xlim(back(low - 0.1 * span), back(high + 0.1 * span))
    axes.set_xlabel(f"{text(axis.name)}{' (log scale)' if logarithmic else ''}")


def _coloured_axis(matrix: Matrix) -> Axis | None:
    """The first choice with more than one label and few enough to tell apart by colour."""
    others = [axis for axis in matrix.others if len(axis.labels) <= len(COLOURS)]
    choices = [axis for axis in others if axis.values is None]
    several = [axis for axis in (*choices, *others) if len(axis.labels) > 1]
    return next(iter(several or choices or others), None)


def _draw_bars(
    axes: Axes,
    measure: Measure,
    axis: Axis | None,
    groups: dict[str, list[Result]],
    colours: dict[str, str],
) -> None:
    slots = max(1, len(colours))
    width = 0.8 / slots
    few = slots * len(groups) <= 8
    order = {label: index for index, label in enumerate(colours)}
    for group, results in enumerate(groups.values()):
        for result in results:
            value = measure.find(result)
            if value is None:
                continue
            label = result.task.labels.get(axis.name, "") if axis else ""
            x = group + width * (order.get(label, 0) - (slots - 1) / 2)
            axes.bar(x, value.value, width * 0.92, color=colours.get(label, COLOURS[0]))
            bars = _bars_of([value])
            if bars:
                axes.errorbar(x, value.value, yerr=bars, color=INK, elinewidth=1.2, capsize=2.5)
            if few:
                axes.annotate(
                    _short_number(value.value),
                    (x, value.value if value.high is None else max(value.value, value.high)),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    size=8.5,
                )
    axes.set_title(measure.title, loc="left")
    axes.set_ylabel(measure.unit)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.14 if few else 0.06)
    _plain_numbers(axes)


def _label_groups(axes: Axes, names: Sequence[str], grouped_by: str, *, hidden: bool) -> None:
    # One group alone would otherwise be as wide as its panel.
    around = 1.1 if len(names) == 1 else 0.6
    axes.set_xlim(-around, len(names) - 1 + around)
    axes.tick_params(axis="x", length=0)
    if hidden:
        axes.set_xticks([])
        return
    axes.set_xticks(range(len(names)), names)
    if sum(len(name) + 2 for name in names) > (34 if len(names) < 9 else 110):
        for tick in axes.get_xticklabels():
            tick.set(rotation=60, ha="right", rotation_mode="anchor")
    axes.set_xlabel(grouped_by)


def _draw_curve(axes: Axes, result: Result, text: Text, *, narrow: bool) -> None:
    train, dev = result.train_curve, result.dev_curve
    axes.plot(train[:, 0], train[:, 1], color=_TRAIN, linewidth=1.2)
    axes.plot(dev[:, 0], dev[:, 1], color=_DEV, marker="o", markersize=4, linewidth=1.2)
    if result.record:
        axes.axvline(result.record.training.best_step, color=QUIET, linestyle="--", linewidth=1)
    state = "" if result.record else f" ({result.state})"
    name = text(result.name, max(8, (26 if narrow else 40) - len(state)))
    axes.set_title(f"{name}{state}", loc="left", size=9.5)
    axes.locator_params(axis="x", nbins=3 if narrow else 4)
    axes.xaxis.set_major_formatter(_steps)
    axes.set_xlim(left=0)


def _steps(step: float, _: object) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"


def _share_loss_axis(axes: Axes, shown: Sequence[Result]) -> None:
    losses = [
        float(loss)
        for result in shown
        for curve in (result.train_curve, result.dev_curve)
        for loss in curve[:, 1]
    ]
    if min(losses) > 0 and max(losses) > 12 * min(losses):
        axes.set_yscale("log")
    else:
        axes.margins(y=0.08)


def _bars_of(values: Sequence[Value | None]) -> Any:
    """The (2, n) lengths below and above each point, or None if no value has an interval."""
    if not any(value and value.low is not None for value in values):
        return None
    below, above = [], []
    for value in values:
        low, high = (value.low, value.high) if value else (None, None)
        # A percentile interval of a skewed sample may leave its own estimate outside.
        below.append(max(0.0, value.value - low) if value and low is not None else 0.0)
        above.append(max(0.0, high - value.value) if value and high is not None else 0.0)
    return [below, above]


def _plain_numbers(axes: Axes) -> None:
    """Ticks with equal decimals, and thousands apart."""
    from matplotlib.ticker import ScalarFormatter

    axes.locator_params(axis="y", nbins=6)
    if max(map(abs, axes.get_ylim())) >= 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    else:
        plain = ScalarFormatter(useOffset=False)
        plain.set_scientific(False)
        axes.yaxis.set_major_formatter(plain)


def _short_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _handle(line: _Series) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=line.colour, marker=line.marker, linestyle=line.dash, linewidth=1.8)


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour)


def _curve_legend() -> list[tuple[Any, str]]:
    from matplotlib.lines import Line2D

    return [
        (Line2D([], [], color=_TRAIN, linewidth=1.6), "train loss"),
        (Line2D([], [], color=_DEV, marker="o", markersize=5), "dev loss"),
        (Line2D([], [], color=QUIET, linestyle="--"), "evaluated checkpoint"),
    ]
