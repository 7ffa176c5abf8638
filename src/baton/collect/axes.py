"""The axes of a matrix: which one is a scale of numbers, and which ones are choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.config.fields import parse_count
from baton.record import TaskPlan


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis and its labels; `values` maps each label to its number, None for a choice.

    Labels stand in the order of the plan, or in ascending order if they are numbers.
    """

    name: str
    labels: list[str]
    values: dict[str, float] | None

    @property
    def is_seed(self) -> bool:
        """A seed is written as a number and is none: 2 is not twice 1."""
        return "seed" in self.name.lower()


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The axes of a plan in plan order, and the one to draw along a number line, if any."""

    axes: list[Axis]
    scale: Axis | None

    @property
    def others(self) -> list[Axis]:
        """Every axis but the scale."""
        return [axis for axis in self.axes if axis is not self.scale]


def matrix_of(tasks: Sequence[TaskPlan]) -> Matrix:
    """Find the axes from the tasks' labels.

    The scale is the axis with the most different numbers, the first of equals, never a seed. A
    label may be a number (`0.8`, `20k`) or a name for one: then the configuration must have
    exactly one number of the axis's name that goes with each label.
    """
    names = dict.fromkeys(name for task in tasks for name in task.labels)
    axes = [_axis(name, tasks) for name in names]
    scales = [axis for axis in axes if axis.values is not None and not axis.is_seed]
    return Matrix(axes=axes, scale=max(scales, key=lambda axis: len(axis.labels), default=None))


def number(label: str) -> float | None:
    """The number that a label such as `0.8`, `1e-4` or `20k` stands for."""
    count = parse_count(label)
    if count is not None:
        return float(count)
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def flattened(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a configuration under its dotted key; lists are leaves."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _axis(name: str, tasks: Sequence[TaskPlan]) -> Axis:
    labels = list(dict.fromkeys(task.labels[name] for task in tasks if name in task.labels))
    found = {label: number(label) for label in labels}
    values: dict[str, float] | None = {k: v for k, v in found.items() if v is not None}
    if values is None or len(values) < len(labels):
        values = _values_in_config(name, tasks)
    # Two labels for one number (1k and 1000) would lie on top of each other.
    if values is None or len(set(values.values())) < len(labels):
        return Axis(name=name, labels=labels, values=None)
    return Axis(name=name, labels=sorted(labels, key=values.__getitem__), values=values)


def _values_in_config(name: str, tasks: Sequence[TaskPlan]) -> dict[str, float] | None:
    """Label → number, where the configuration has a number of the axis's name for each."""
    values: dict[str, float] = {}
    for task in tasks:
        if name not in task.labels:
            continue
        leaves = flattened(task.config)
        numbers = [
            value
            for key, value in leaves.items()
            if (key == name or key.endswith(f".{name}")) and type(value) in (int, float)
        ]
        if len(numbers) != 1 or values.setdefault(task.labels[name], numbers[0]) != numbers[0]:
            return None
    return values
