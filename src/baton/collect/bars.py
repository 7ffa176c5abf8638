"""`method_comparison.png`: scores and cost as bars, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from baton.collect.axes import Axis, Matrix
from baton.collect.figure import COLOURS, INK, Frame, Text, shortened, style
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

BARS = 60


def draw_methods(heading: Heading, matrix: Matrix, results: Sequence[Result]) -> Drawing:
    """Scores and cost as bars, coloured by the first axis that is a choice."""
    panels = measures(results)
    if not panels:
        return Drawing(png=None, reason="no task has a result yet")
    axis = _coloured_axis(matrix)
    others = [other for other in matrix.axes if other is not axis]
    with style():
        text = Text(names_of(matrix))
        groups = _groups(others, results)
        colours = dict(zip(axis.labels, COLOURS, strict=False)) if axis else {}
        fit = max(1, BARS // max(1, len(colours)))
        shown = groups[:fit]
        wide = len(shown) * max(1, len(colours)) > 24
        names = [_group_name(others, group[0], text) for group in shown]
        grouped_by = ", ".join(text(other.name) for other in others)
        beyond = len(groups) - len(shown)
        caption = [INTERVALS, missing_tasks(results), left_out(beyond, "groups"), renamed(text)]
        columns = 1 if wide else columns_for(len(panels))
        frame = Frame(
            len(panels),
            columns,
            title=text.plain(
                heading.title(f"scores and cost by {text(axis.name) if axis else 'task'}")
            ),
            notice=text.plain(heading.notice),
            caption=" ".join(filter(None, caption)),
            panel_height=2.0 if wide else 3.1,
            legend=[(_patch(colour), text(label)) for label, colour in colours.items()],
        )
        for index, (axes, measure) in enumerate(zip(frame.axes, panels, strict=True)):
            _draw_bars(axes, measure, axis, shown, colours, text)
            last = index >= len(panels) - columns
            _label_groups(axes, names, grouped_by, hidden=wide and not last)
        return Drawing(
            png=frame.png(),
            alt=f"{', '.join(panel.title for panel in panels)} as bars"
            + (f", coloured by {axis.name}" if axis else ""),
            renamed=text.replaced,
        )


def _groups(others: Sequence[Axis], results: Sequence[Result]) -> list[list[Result]]:
    """Tasks that agree on these axes, in the order of their labels; groups without a result go."""
    places = {axis.name: {label: i for i, label in enumerate(axis.labels)} for axis in others}
    groups: dict[tuple[int, ...], list[Result]] = {}
    for result in results:
        labels = result.task.labels
        place = tuple(order.get(labels.get(name, ""), -1) for name, order in places.items())
        groups.setdefault(place, []).append(result)
    return [groups[place] for place in sorted(groups) if any(r.record for r in groups[place])]


def _group_name(others: Sequence[Axis], result: Result, text: Text) -> str:
    labels = result.task.labels
    return ", ".join(text(labels[axis.name], 18) for axis in others if axis.name in labels)


def _coloured_axis(matrix: Matrix) -> Axis | None:
    """The first choice with more than one label and few enough to tell apart by colour.

    Without one the scale has the colours, if there is another axis to group its bars by.
    """
    few = [axis for axis in matrix.axes if len(axis.labels) <= len(COLOURS)]
    others = [axis for axis in few if axis is not matrix.scale]
    choices = [axis for axis in others if axis.values is None]
    several = [axis for axis in (*choices, *others) if len(axis.labels) > 1]
    scale = [axis for axis in few if axis is matrix.scale and matrix.others]
    return next(iter(several or choices or others or scale), None)


def _draw_bars(
    axes: Axes,
    measure: Measure,
    axis: Axis | None,
    groups: Sequence[Sequence[Result]],
    colours: dict[str, str],
    text: Text,
) -> None:
    slots = max(1, len(colours))
    width = 0.8 / slots
    few = slots * len(groups) <= 8
    for slot, (label, colour) in enumerate((colours or {"": COLOURS[0]}).items()):
        bars = [
            (group + width * (slot - (slots - 1) / 2), value)
            for group, results in enumerate(groups)
            for result in results
            if (result.task.labels.get(axis.name, "") if axis else "") == label
            and (value := measure.find(result)) is not None
        ]
        x, heights = [place for place, _ in bars], [value.value for _, value in bars]
        axes.bar(x, heights, width * 0.92, color=colour)
        ends = error_bars([value for _, value in bars])
        if ends:
            look = {"color": INK, "linestyle": "none", "elinewidth": 1.2, "capsize": 2.5}
            axes.errorbar(x, heights, yerr=ends, **look)  # type: ignore[arg-type]
        for place, value in bars if few else []:
            axes.annotate(
                _short_number(value.value),
                (place, max(value.value, value.value if value.high is None else value.high)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                size=8.5,
            )
    axes.set_title(shortened(text.plain(measure.title), 44), loc="left")
    axes.set_ylabel(measure.unit)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.14 if few else 0.06)
    plain_numbers(axes)


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


def _short_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour)
