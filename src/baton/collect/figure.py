"""The frame that all plots share: title, notice, panels in a grid, legend and caption below."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito, "Color Universal Design" (2008), in the order of best contrast on white; the
# yellow is left out because a thin line of it cannot be seen.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--")
INK = "#222222"
QUIET = "#666666"
WARNING = "#B00020"

WIDTH_INCHES = 12.0
# 12 inches at 150: 1800 pixels; 10 points are then 14 pixels of a 1200 pixel wide view.
DPI = 150
_LINE_INCHES = 0.2
# Measuring every label to lay out 48 panels takes seconds; beyond this many they are all alike.
_MEASURED_PANELS = 12
_CHARACTERS_A_LINE = 150

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it: the same picture on every machine
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a task name is a $
    "svg.hashsalt": "baton",
}


@contextmanager
def style() -> Iterator[None]:
    """Our look, for what is drawn inside; matplotlib is imported here and not before."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


class Frame:
    """A figure of `panels` axes in `columns` columns, grown to fit its title and its legend."""

    def __init__(
        self,
        panels: int,
        columns: int,
        *,
        title: str,
        notice: str,
        caption: str,
        panel_height: float,
        legend: Sequence[tuple[Any, str]] = (),
        share: bool = False,
    ) -> None:
        from matplotlib.figure import Figure

        rows = math.ceil(panels / columns)
        heads = _wrapped(title, 105) + _wrapped(f"Notice: {notice}" if notice else "", 130)
        feet = _wrapped(caption, _CHARACTERS_A_LINE)
        legend_columns, legend_rows = _legend_shape([text for _, text in legend])
        top = 0.2 + 1.25 * _LINE_INCHES * len(heads)
        bottom = 0.15 + _LINE_INCHES * len(feet) + 1.25 * _LINE_INCHES * legend_rows
        height = top + rows * panel_height + bottom
        self.figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI)
        if panels > _MEASURED_PANELS:
            self._place_evenly(columns, panel_height, top=top, bottom=bottom)
        else:
            self.figure.set_layout_engine(
                "constrained",
                rect=(0.005, bottom / height, 0.99, (height - top - bottom) / height),
                w_pad=0.07,
                h_pad=0.09,
            )
        grid = self.figure.subplots(rows, columns, squeeze=False, sharey=share)
        flat: list[Axes] = list(grid.flat)
        self.axes = flat[:panels]
        for spare in flat[panels:]:
            spare.remove()

        titles = len(_wrapped(title, 105))
        for index, line in enumerate(heads):
            y = 1 - (0.15 + 1.25 * _LINE_INCHES * index) / height
            look = {"size": 13, "weight": "bold"} if index < titles else {"color": WARNING}
            self.figure.text(0.012, y, line, ha="left", va="top", **look)
        for index, line in enumerate(reversed(feet)):
            y = (0.1 + _LINE_INCHES * index) / height
            self.figure.text(0.012, y, line, ha="left", va="bottom", size=9, color=QUIET)
        if legend:
            self.figure.legend(
                [handle for handle, _ in legend],
                # matplotlib leaves labels out that begin with an underscore.
                [f" {text}" if text.startswith("_") else text for _, text in legend],
                loc="lower center",
                bbox_to_anchor=(0.5, (0.1 + _LINE_INCHES * len(feet)) / height),
                ncols=legend_columns,
                frameon=False,
                borderaxespad=0,
            )

    def _place_evenly(
        self, columns: int, panel_height: float, *, top: float, bottom: float
    ) -> None:
        """Fixed margins in inches, wide enough for a title, tick labels and an outer label."""
        height = self.figure.get_figheight()
        left, gap, between = 0.55, 0.18, 0.5
        width = (WIDTH_INCHES - left - 0.1 - gap * (columns - 1)) / columns
        self.figure.subplots_adjust(
            left=left / WIDTH_INCHES,
            right=1 - 0.1 / WIDTH_INCHES,
            top=1 - (top + 0.2) / height,
            bottom=(bottom + between) / height,
            wspace=gap / width,
            hspace=between / (panel_height - between),
        )

    def png(self) -> bytes:
        """The picture. The same input gives the same bytes with the same matplotlib."""
        data = io.BytesIO()
        self.figure.savefig(data, format="png", metadata={"Software": "baton"})
        return data.getvalue()


class Text:
    """Makes names drawable: the plot's font has no Chinese, and would draw empty boxes.

    A name with such a character is drawn as `#3`, by its place among `names`; `replaced` says
    which is which, for the page beside the plot.
    """

    def __init__(self, names: Sequence[str]) -> None:
        from matplotlib import font_manager, ft2font

        font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))
        self._drawable = font.get_charmap().keys()
        self.replaced = {
            name: f"#{index}"
            for index, name in enumerate(dict.fromkeys(names), start=1)
            if self.plain(name) != name
        }

    def __call__(self, name: str, width: int = 40) -> str:
        return shortened(self.replaced.get(name, name), width)

    def plain(self, text: str) -> str:
        """`text` on one line, with ? for what cannot be drawn; the page has it in full."""
        line = " ".join(text.split())
        return "".join(c if ord(c) in self._drawable else "?" for c in line)


def lighter(colour: str, part: float) -> str:
    """`colour` with this part of the way to white."""
    channels = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * part):02x}" for c in channels)


def shortened(text: str, width: int) -> str:
    """At most `width` characters; the middle goes, because names differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[head + 1 - width :]}"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width)


def _legend_shape(labels: Sequence[str]) -> tuple[int, int]:
    if not labels:
        return 1, 0
    columns = max(1, min(len(labels), _CHARACTERS_A_LINE // (max(map(len, labels)) + 8)))
    return columns, math.ceil(len(labels) / columns)
