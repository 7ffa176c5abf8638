"""Experiment files: which pipeline, which matrix, which configuration."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.config.decode import override, set_key
from baton.config.document import FROM_SET, Document
from baton.errors import ConfigError

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Keys of an experiment file that are not part of a task's configuration.
OWN_KEYS = ("pipeline", "matrix", "split")


@dataclass(frozen=True)
class Point:
    """One combination of labels, and the configuration it stands for."""

    name: str
    labels: dict[str, str]
    document: Document


@dataclass(frozen=True)
class Experiment:
    """A file in `jobs/`, with overrides applied, not yet expanded."""

    name: str
    pipeline: str
    document: Document

    @classmethod
    def read(cls, name: str, document: Document) -> Experiment:
        """Check the keys that belong to the experiment itself. Raises `ConfigError`."""
        pipeline = document.data.get("pipeline")
        if not isinstance(pipeline, str):
            raise ConfigError(
                f"{document.place(('pipeline',))}: pipeline: missing; name one, e.g. medical_qa"
            )
        return cls(name, pipeline, document)

    def split(self, stages: Sequence[str]) -> list[str]:
        """Which of the pipeline's stages get a job of their own on sites that have a queue.

        Raises:
            ConfigError: `split` is no list of names, or names a stage that there is not.
        """
        named = self.document.data.get("split") or []
        where = f"{self.document.place(('split',))}: split"
        if not isinstance(named, list):
            raise ConfigError(f"{where}: expected a list of stages such as [data], got {named!r}")
        for stage in named:
            if stage not in stages:
                raise ConfigError(
                    f"{where}: {self.pipeline} has the stages {', '.join(stages)}; got {stage!r}"
                )
        return [str(stage) for stage in named]

    def points(self) -> Iterator[Point]:
        """Every combination of the matrix, first axis slowest.

        An axis is a configuration key with a list of values (the label is the value as
        written), or with a mapping of labels to values, or a free name with a mapping of
        labels to several `key: value` settings. What `--set` says of one of those several wins.
        """
        axes = self._axes()
        for combination in itertools.product(*(options for _, options in axes)):
            labels, data, lines = {}, _copy(self._base()), dict(self.document.lines)
            for (axis, _), option in zip(axes, combination, strict=True):
                labels[axis.rpartition(".")[2]] = option.label
                for key, value in option.settings.items():
                    if key != axis and self._is_set(key):
                        continue
                    self._apply(data, key, value, f"{option.place}.{option.label}")
                    lines[tuple(key.split("."))] = option.line
            name = "_".join(labels.values()) or self.name.rpartition("/")[2]
            yield Point(name, labels, Document(self.document.path, data, lines))

    def _apply(self, data: dict[str, Any], key: str, value: Any, where: str) -> None:
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            inner = next(iter(value), "…")
            raise ConfigError(
                f"{where}: would replace all of {key}; write one dotted setting each, such as"
                f" {key}.{inner}"
            )
        if not all(key.split(".")):
            raise ConfigError(f"{where}: {key!r} is not a key; write it as in train.batch_samples")
        try:
            set_key(data, key, value)
        except ConfigError:
            raise ConfigError(
                f"{where}: {key!r} leads through something that is not a mapping"
            ) from None

    def _is_set(self, key: str) -> bool:
        """Does the value come from the command line?"""
        path = tuple(key.split("."))
        value: Any = self.document.data
        for name in path:
            if not isinstance(value, dict) or name not in value:
                return False
            value = value[name]
        return self.document.line(path) == FROM_SET

    def _base(self) -> dict[str, Any]:
        return {k: v for k, v in self.document.data.items() if k not in OWN_KEYS}

    def _axes(self) -> list[tuple[str, list[_Option]]]:
        matrix = self.document.data.get("matrix") or {}
        where = f"{self.document.place(('matrix',))}: matrix"
        if not isinstance(matrix, dict):
            raise ConfigError(f"{where}: expected a mapping of axes, got {matrix!r}")
        axes = [(axis, self._options(axis, values)) for axis, values in matrix.items()]
        names = [axis.rpartition(".")[2] for axis, _ in axes]
        if len(set(names)) < len(names):
            raise ConfigError(f"{where}: two axes end in the same word: {', '.join(names)}")
        return axes

    def _options(self, axis: str, values: Any) -> list[_Option]:
        where = f"{self.document.place(('matrix', axis))}: matrix.{axis}"
        if not isinstance(values, list | dict) or not values:
            raise ConfigError(
                f"{where}: expected a list of values or a mapping of labels, got {values!r}"
            )
        options = []
        labelled = isinstance(values, dict)
        pairs = values.items() if isinstance(values, dict) else ((str(v), v) for v in values)
        for number, (label, value) in enumerate(pairs):
            if not _TASK_NAME.fullmatch(label):
                advice = "choose another label" if labelled else "write `label: value` instead"
                raise ConfigError(
                    f"{where}: {label!r} cannot be part of a task name (letters, digits, . _ -);"
                    f" {advice}"
                )
            several = isinstance(value, dict) and "." not in axis
            settings = dict(value) if several else {axis: value}
            path = ("matrix", axis, label if labelled else number)
            options.append(_Option(label, settings, where, self.document.line(path)))
        if len({option.label for option in options}) < len(options):
            raise ConfigError(f"{where}: a label occurs twice")
        return options


@dataclass(frozen=True)
class _Option:
    label: str
    settings: dict[str, Any]
    place: str
    line: int


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def apply_set(document: Document, settings: Sequence[str]) -> Document:
    """Apply `--set key=value` words, in order. Raises `ConfigError`.

    `matrix.AXIS=[…]` replaces an axis, whose name may hold dots itself.
    """
    from baton.config.yaml import parse_scalar

    for setting in settings:
        key, found, text = setting.partition("=")
        if not found or not key:
            raise ConfigError(f"--set {setting}: expected key=value, e.g. train.epochs=1")
        try:
            value = parse_scalar(text)
        except ConfigError as error:
            raise ConfigError(f"--set {key}: {error}") from error
        if key.startswith("matrix."):
            axis = key.removeprefix("matrix.")
            data = _copy(document.data)
            data["matrix"] = {**(data.get("matrix") or {}), axis: value}
            if value is None:
                del data["matrix"][axis]
            lines = {at: n for at, n in document.lines.items() if at[:2] != ("matrix", axis)}
            lines |= {("matrix",): FROM_SET, ("matrix", axis): FROM_SET}
            document = Document(document.path, data, lines)
        else:
            document = override(document, key, value)
    return document


def available(folder: Path) -> list[str]:
    """Names of all experiments below a `jobs` folder."""
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    )


def nearest(word: str, names: Sequence[str]) -> str:
    """` Did you mean …?` with up to three names, or the list of all."""
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are: {', '.join(names)}" if names else "there are none"
