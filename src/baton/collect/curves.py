"""`loss_curves.png`: train and dev loss, and dev scores if any, over the steps of each task."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from baton.collect.figure import COLOURS, MARKERS, QUIET, Frame, Text, lighter, style
from baton.collect.gather import TASKS_WITH_CURVES, Result
from baton.collect.plots import Drawing, Heading, plain_powers, renamed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN = lighter(COLOURS[0], 0.5)
_DEV = COLOURS[1]
# The loss has the first two.
_SCORES = list(zip((*COLOURS[2:], *COLOURS[:2]), (*MARKERS[1:], MARKERS[0]), strict=True))


def draw_curves(heading: Heading, results: Sequence[Result]) -> Drawing:
    """Train and dev loss over the steps, one panel a task, all on one loss axis."""
    curved = [result for result in results if len(result.train_curve) or len(result.dev_curve)]
    if not curved:
        return Drawing(png=None, reason="no task has logged a loss yet")
    shown = curved[:TASKS_WITH_CURVES]
    with style():
        text = Text([result.name for result in results])
        scores = _scores_of(shown)
        small = len(shown) > 12
        columns = 6 if len(shown) > 24 else 4 if len(shown) > 9 else min(3, len(shown))
        unread = sum(not result.curves_read for result in results)
        without, beyond = len(results) - len(curved) - unread, len(curved) - len(shown) + unread
        caption = [
            f"{without} tasks have no curve yet." if without else "",
            f"{beyond} more tasks are left out here." if beyond else "",
            renamed(text),
        ]
        frame = Frame(
            len(shown),
            columns,
            title=text.plain(heading.title("train and dev loss")),
            notice=text.plain(heading.notice),
            caption=" ".join(filter(None, caption)),
            panel_height=1.8 if small else 2.5 if columns == 4 else 3.0 if columns > 1 else 5.0,
            legend=_curve_legend(scores),
            share=True,
        )
        for index, (axes, result) in enumerate(zip(frame.axes, shown, strict=True)):
            _draw_curve(axes, result, text, width={6: 22, 4: 30}.get(columns, 42))
            _draw_scores(axes, result, scores)
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


def _draw_curve(axes: Axes, result: Result, text: Text, *, width: int) -> None:
    train, dev = result.train_curve, result.dev_curve
    axes.plot(train[:, 0], train[:, 1], color=_TRAIN, linewidth=1.2)
    axes.plot(dev[:, 0], dev[:, 1], color=_DEV, marker="o", markersize=4, linewidth=1.2)
    if result.record:
        axes.axvline(result.record.training.best_step, color=QUIET, linestyle="--", linewidth=1)
    state = "" if result.record else f" ({result.state})"
    name = text(result.name, max(8, width - len(state)))
    axes.set_title(text.plain(f"{name}{state}"), loc="left", size=9.5)
    axes.locator_params(axis="x", nbins=3 if width < 30 else 4)
    axes.xaxis.set_major_formatter(_steps)
    axes.set_xlim(left=0)


def _draw_scores(axes: Axes, result: Result, names: Sequence[str]) -> None:
    """The scores of a task on an axis of their own, on the right; each name has its colour."""
    curves = result.record.dev_scores if result.record else {}
    if not curves:
        return
    scale = axes.twinx()
    for name, rows in curves.items():
        colour, marker = _SCORES[names.index(name) % len(_SCORES)]
        steps, scores = zip(*rows, strict=True)
        scale.plot(steps, scores, color=colour, marker=marker, markersize=3, linewidth=1.0)
    scale.set_ylabel(names[0] if len(names) == 1 else "score")
    scale.set_ylim(bottom=0)
    scale.grid(visible=False)


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
        plain_powers(axes)
    else:
        axes.margins(y=0.08)


def _scores_of(shown: Sequence[Result]) -> list[str]:
    """Names of the scores that were taken with the dev loss in any of the tasks."""
    return sorted({name for r in shown if r.record for name in r.record.dev_scores})


def _curve_legend(scores: Sequence[str]) -> list[tuple[Any, str]]:
    from matplotlib.lines import Line2D

    return [
        (Line2D([], [], color=_TRAIN, linewidth=1.6), "train loss"),
        (Line2D([], [], color=_DEV, marker="o", markersize=5), "dev loss"),
        *(
            (Line2D([], [], color=colour, marker=marker, markersize=4), name)
            for name, (colour, marker) in zip(scores, itertools.cycle(_SCORES), strict=False)
        ),
        (Line2D([], [], color=QUIET, linestyle="--"), "evaluated checkpoint"),
    ]
