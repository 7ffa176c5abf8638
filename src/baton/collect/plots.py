"""What the plots of an experiment share: their heading, their result, their captions.

Each `draw_…` function returns a `Drawing`: PNG bytes, or none and the reason why there is
nothing to draw. What does not fit legibly is left out, and the caption says how much that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from baton.collect.axes import Matrix
from baton.collect.figure import Text
from baton.collect.gather import Result
from baton.collect.measures import Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INTERVALS = "Error bars: 95 % bootstrap intervals over the test rows, where the record has them."


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


def names_of(matrix: Matrix) -> list[str]:
    """Every name in the plots, in an order that gives each the same `#number` in both."""
    return [name for axis in matrix.axes for name in (axis.name, *axis.labels)]


def columns_for(panels: int) -> int:
    return 2 if panels in (2, 4) else min(3, panels)


def missing_tasks(results: Sequence[Result]) -> str:
    missing = sum(result.record is None for result in results)
    return f"{missing} of {len(results)} tasks have no result and are not drawn." if missing else ""


def left_out(count: int, what: str) -> str:
    return f"{count} more {what} are left out here; results_summary.csv has all." if count else ""


def renamed(text: Text) -> str:
    return "A # and a number is a name that this font cannot draw." if text.replaced else ""


def error_bars(values: Sequence[Value | None]) -> Any:
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


def plain_numbers(axes: Axes) -> None:
    """Ticks with equal decimals, and thousands apart."""
    from matplotlib.ticker import ScalarFormatter

    axes.locator_params(axis="y", nbins=6)
    if max(map(abs, axes.get_ylim())) >= 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    else:
        plain = ScalarFormatter(useOffset=False)
        plain.set_scientific(False)
        axes.yaxis.set_major_formatter(plain)


def plain_powers(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: matplotlib writes powers as formulas of TeX."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
