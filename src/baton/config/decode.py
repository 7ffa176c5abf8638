"""Plain data (of YAML or JSON) into frozen dataclasses and back, by the fields' annotations.

Every problem is reported, not only the first. An annotation may be str, int, float, bool, Path,
an Enum (by value), Literal, Any, a dataclass, list[X], tuple[X, ...], tuple[X, Y], dict[str, X],
a union of these (dataclasses are told apart by a Literal field they share), a NewType, or
Annotated with a `Bound`. Others are a mistake in our code and raise TypeError.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NewType, TypeVar, Union, get_args, get_origin

from baton.config.annotations import choices_of, container_of, fields_of, hints_of, is_class, tag_of
from baton.config.document import Document, KeyPath, dotted
from baton.config.fields import (
    Bound,
    Count,
    CountText,
    Fraction,
    NonNegative,
    Positive,
    above,
    at_least,
    at_most,
    between,
    parse_count,
)
from baton.config.messages import advise, describe, found, nearest
from baton.config.override import override, set_key
from baton.errors import ConfigError

# What the rest of baton needs to declare and read a configuration, in one import.
__all__ = [
    "Bound",
    "Count",
    "Fraction",
    "NonNegative",
    "Positive",
    "above",
    "at_least",
    "at_most",
    "between",
    "decode",
    "encode",
    "override",
    "set_key",
]

T = TypeVar("T")

_BAD: Any = object()  # stands for a value whose problem has been noted


def decode(
    cls: type[T],
    data: Any,
    *,
    where: str = "",
    document: Document | None = None,
    path: KeyPath = (),
) -> T:
    """Make a `cls` of plain data, or raise ConfigError with one line for each problem.

    `path` is where `data` stands inside the document. A problem begins with file and line
    where there is a document, with `where` (such as `plan.json`) where there is none.
    """
    decoder = _Decoder(where, document)
    value: T = decoder.value(cls, data, path)
    if decoder.problems:
        in_file_order = sorted(decoder.problems, key=lambda problem: problem[0])
        raise ConfigError([text for _, text in in_file_order])
    return value


def encode(value: Any) -> Any:
    """Plain JSON types in the order of the fields, such that `decode` gives an equal object."""
    if value is None or type(value) in (bool, int, float, str):
        return value  # asked first: most values of a plan of 1,000 tasks are these
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields_of(type(value))}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {encode(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot encode {value!r}")


def default_of(field: dataclasses.Field[Any], default: Any) -> Any:
    """The object that stands where a key is not given, if it is not what its class has by itself.

    An object of defaults only may hold fields that follow from others, so it is made anew.
    """
    made: Any = field.default_factory
    value = None if made is dataclasses.MISSING or isinstance(made, type) else made()
    if default is not None and getattr(default, field.name) != field.default:
        held = getattr(default, field.name)
        value = None if isinstance(made, type) and held == made() else held
    return value if dataclasses.is_dataclass(value) else None


class _Decoder:
    """Notes (line, text) of every problem; each method returns a value or `_BAD`."""

    def __init__(self, where: str, document: Document | None) -> None:
        self.where = where
        self.document = document
        self.problems: list[tuple[int, str]] = []

    def problem(self, path: KeyPath, what: str) -> Any:
        line = self.document.line(path) if self.document else 0
        place = self.document.place(path) if self.document else self.where
        self.problems.append((line, ": ".join(filter(None, (place, dotted(path), what)))))
        return _BAD

    def wrong(self, kind: Any, data: Any, path: KeyPath) -> Any:
        advice = advise(kind, data)
        what = f"expected {describe(kind)}, got {found(data)}"
        return self.problem(path, f"{what}; {advice}" if advice else what)

    def value(self, kind: Any, data: Any, path: KeyPath) -> Any:
        origin = get_origin(kind) or kind
        if isinstance(kind, NewType):
            return self.value(kind.__supertype__, data, path)
        if origin is Any:
            return data
        if origin is Annotated:
            return self.annotated(kind, data, path)
        if origin in (Union, types.UnionType):
            return self.union(kind, data, path)
        if origin in (list, tuple):
            return self.sequence(kind, data, path)
        if origin is dict:
            return self.mapping(kind, data, path)
        if origin is Literal or is_class(kind, enum.Enum):
            return self.choice(kind, data, path)
        if dataclasses.is_dataclass(kind):
            return self.object(kind, data, path)
        if origin in (str, int, float, bool, Path):
            return self.scalar(kind, data, path)
        raise TypeError(f"{dotted(path)}: a configuration cannot have the annotation {kind!r}")

    def scalar(self, kind: Any, data: Any, path: KeyPath) -> Any:
        if kind in (int, float) and type(data) in (int, float):
            return self.number(kind, data, path)
        if kind is Path and isinstance(data, str) and data:
            return Path(data)
        return data if type(data) is kind else self.wrong(kind, data, path)

    def number(self, kind: Any, data: float, path: KeyPath) -> Any:
        try:
            number = kind(data)
        except (OverflowError, ValueError):  # int(.inf), int(.nan), float(10**400)
            return self.wrong(kind, data, path)
        exact = number == data if kind is int else math.isfinite(number)
        return number if exact else self.wrong(kind, data, path)

    def annotated(self, kind: Any, data: Any, path: KeyPath) -> Any:
        base, *marks = get_args(kind)
        if isinstance(data, str) and any(isinstance(mark, CountText) for mark in marks):
            count = parse_count(data)
            if count is None:
                return self.wrong(kind, data, path)
            return self.bounds(marks, count, path)
        return self.bounds(marks, self.value(base, data, path), path)

    def bounds(self, marks: list[Any], value: Any, path: KeyPath) -> Any:
        if value is _BAD or value is None or isinstance(value, str):
            return value
        for mark in marks:
            if isinstance(mark, Bound) and not mark.holds(value):
                return self.problem(path, f"must be {mark.text}, got {value}")
        return value

    def choice(self, kind: Any, data: Any, path: KeyPath) -> Any:
        for raw, value in choices_of(kind):
            if type(raw) is type(data) and raw == data:  # True == 1, but is not what was meant
                return value
        return self.wrong(kind, data, path)

    def sequence(self, kind: Any, data: Any, path: KeyPath) -> Any:
        if not isinstance(data, list):
            return self.wrong(kind, data, path)
        make, args = get_origin(kind) or kind, get_args(kind) or (Any, ...)
        if make is list or args[-1] is ...:
            args = (args[0],) * len(data)
        if len(args) != len(data):
            return self.wrong(kind, data, path)
        items = [
            self.value(each, item, (*path, index))
            for index, (each, item) in enumerate(zip(args, data, strict=True))
        ]
        return _BAD if any(item is _BAD for item in items) else make(items)

    def mapping(self, kind: Any, data: Any, path: KeyPath) -> Any:
        if not isinstance(data, dict):
            return self.wrong(kind, data, path)
        key_kind, item_kind = get_args(kind) or (str, Any)
        result = {
            self.value(key_kind, key, (*path, key)): self.value(item_kind, item, (*path, key))
            for key, item in data.items()
        }
        return _BAD if any(_BAD is each for pair in result.items() for each in pair) else result

    def object(self, cls: Any, data: Any, path: KeyPath, default: Any = None) -> Any:
        """A `cls`; what `data` does not say is as in `default`, or as `cls` has it."""
        if not isinstance(data, dict):
            return self.wrong(cls, data, path)
        hints, known = hints_of(cls), {field.name: field for field in fields_of(cls)}
        values: dict[str, Any] = {}
        for key in data:
            if key not in known:
                near = nearest(key, known)
                listed = ", ".join(known) or "none"
                advice = f"did you mean {near!r}?" if near else f"known keys: {listed}"
                self.problem((*path, key), f"unknown key; {advice}")
                if near and near not in data:
                    values[near] = _BAD  # or __post_init__ would judge the default instead
        for name, field in known.items():
            if name in data:
                within = default_of(field, default) if isinstance(data[name], dict) else None
                values[name] = self.field(hints[name], data[name], (*path, name), within)
            elif default is not None:
                values[name] = getattr(default, name)
            elif field.default is field.default_factory is dataclasses.MISSING:
                missing = f"missing key; expected {describe(hints[name])}"
                values[name] = self.problem((*path, name), missing)
        if any(value is _BAD for value in values.values()):
            return _BAD
        try:
            return cls(**values)
        except ValueError as error:
            return self.problem(path, str(error))

    def field(self, kind: Any, data: Any, path: KeyPath, default: Any) -> Any:
        """As `value`, for a key whose default may be an object with defaults of its own."""
        members = [m for m in get_args(kind) or (kind,) if m is not types.NoneType]
        if members == [type(default)]:
            return self.object(members[0], data, path, default)
        return self.value(kind, data, path)

    def union(self, kind: Any, data: Any, path: KeyPath) -> Any:
        members = get_args(kind)
        if data is None and types.NoneType in members:
            return None
        members = tuple(member for member in members if member is not types.NoneType)
        classes = tuple(member for member in members if dataclasses.is_dataclass(member))
        if isinstance(data, dict) and len(classes) > 1:
            return self.tagged(classes, data, path)
        # A lone list or mapping among the members is what a list or mapping was meant to be.
        fitting = [member for member in members if container_of(member) is type(data)]
        if len(fitting) == 1 or len(members) == 1:
            return self.value((fitting or members)[0], data, path)
        for member in members:
            trial = _Decoder(self.where, self.document)
            value = trial.value(member, data, path)
            if not trial.problems:
                return value
        return self.wrong(kind, data, path)

    def tagged(self, classes: tuple[Any, ...], data: dict[str, Any], path: KeyPath) -> Any:
        tag, members = tag_of(classes)
        choice: Any = Literal[tuple(members)]
        if tag not in data:
            return self.problem((*path, tag), f"missing key; expected {describe(choice)}")
        chosen = self.value(choice, data[tag], (*path, tag))
        return _BAD if chosen is _BAD else self.value(members[chosen], data, path)
