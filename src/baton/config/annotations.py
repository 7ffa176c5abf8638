"""What the annotations of a configuration's fields say, once they are resolved."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Annotated, Any, Literal, NewType, get_args, get_origin, get_type_hints


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Annotation of each field, names in quotes looked up in the module of the class."""
    return get_type_hints(cls, include_extras=True)


@functools.cache
def fields_of(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Fields that are arguments; others follow from these and are in no file."""
    return tuple(field for field in dataclasses.fields(cls) if field.init)


@functools.cache
def tag_of(classes: tuple[Any, ...]) -> tuple[str, dict[Any, Any]]:
    """Name of the Literal field that tells the classes apart, and the class of each value."""
    for name in (field.name for field in fields_of(classes[0])):
        hints = [hints_of(cls).get(name) for cls in classes]
        members = {v: cls for cls, hint in zip(classes, hints, strict=True) for v in get_args(hint)}
        total = sum(len(get_args(hint)) for hint in hints)
        if all(get_origin(hint) is Literal for hint in hints) and len(members) == total:
            return name, members
    names = ", ".join(cls.__name__ for cls in classes)
    raise TypeError(f"no Literal field tells {names} apart")


def is_class(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def bare(kind: Any) -> Any:
    """The annotation without NewType and Annotated around it."""
    while get_origin(kind) is Annotated or isinstance(kind, NewType):
        kind = kind.__supertype__ if isinstance(kind, NewType) else get_args(kind)[0]
    return kind


def container_of(kind: Any) -> type | None:
    """Plain type, list or dict, that an annotation is written as; None for scalars."""
    kind = bare(kind)
    if dataclasses.is_dataclass(kind):
        return dict
    return {list: list, tuple: list, dict: dict}.get(get_origin(kind) or kind)


def choices_of(kind: Any) -> list[tuple[Any, Any]]:
    """Of a Literal or an Enum: pairs of what is written and the value it stands for."""
    if is_class(kind, enum.Enum):
        return [(member.value, member) for member in kind]
    return [(raw, raw) for raw in get_args(kind)] if get_origin(kind) is Literal else []
