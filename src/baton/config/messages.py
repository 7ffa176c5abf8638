"""The words of a problem: what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NewType, Union, get_args, get_origin

from baton.config.annotations import bare, choices_of, container_of
from baton.config.document import clip
from baton.config.fields import Bound, CountText, parse_count
from baton.config.scalar import plain

_SCALARS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    Any: "a value",
    types.NoneType: "null",
}


def describe(kind: Any) -> str:
    """What an annotation asks for, to complete "expected …"."""
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, NewType):
        return describe(kind.__supertype__)
    if origin is Annotated:
        count = any(isinstance(mark, CountText) for mark in args)
        base = "a count such as 20000, 20k or 1.5M" if count else describe(args[0])
        return base + "".join(f" ({mark.text})" for mark in args if isinstance(mark, Bound))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(each) for each in args))
    if choices := choices_of(kind):
        names = ", ".join(repr(raw) for raw, _ in choices)
        return names if len(choices) == 1 else f"one of {names}"
    if origin is tuple and args[-1] is not ...:
        return f"a list of {len(args)} items"
    return _SCALARS.get(kind) or ("a list" if container_of(kind) is list else "a mapping")


def found(data: Any) -> str:
    """What stands there, to complete "got …"."""
    if isinstance(data, str):
        return f"the text {clip(data)!r}"
    if data is None or isinstance(data, bool):
        return "null" if data is None else str(data).lower()
    if isinstance(data, int | float):
        return f"the number {clip(str(data))}"
    if isinstance(data, list):
        return f"a list of {len(data)} item{'' if len(data) == 1 else 's'}"
    return "a mapping" if isinstance(data, dict) else f"a {type(data).__name__}"


def advise(kind: Any, data: Any) -> str:
    """What to do about a value that does not fit, or nothing where that is plain to see."""
    kind = bare(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return next(filter(None, (advise(member, data) for member in get_args(kind))), "")
    if kind is str and isinstance(data, bool | int | float):
        return "put it in quotes"
    if kind is float and type(data) in (int, float):
        return "write a finite number"
    if not isinstance(data, str):
        return ""
    if kind in (int, float):
        if type(plain(data)) in (int, float):
            return "remove the quotes"
        count = parse_count(data)
        return "" if count is None else f"write {count}"
    near = nearest(data, [raw for raw, _ in choices_of(kind) if isinstance(raw, str)])
    return f"did you mean {near!r}?" if near else ""


def nearest(word: Any, names: Iterable[str]) -> str | None:
    """The name that the word was probably meant to be, if there is one."""
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(word).lower(), lowered, n=1)
    return lowered[near[0]] if near and isinstance(word, str) else None
