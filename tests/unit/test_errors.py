"""Exit statuses: in one place, the same for everybody."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from baton import errors
from baton.errors import BatonError, ExitStatus, StopError

SOURCES = sorted((Path(errors.__file__).parent).rglob("*.py"))
KINDS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, BatonError)
]


def test_the_four_statuses_are_what_the_host_side_knows() -> None:
    assert {status.name: status.value for status in ExitStatus} == {
        "FINISHED": 0,
        "FAILED": 1,
        "HANDED_OVER": 75,
        "STOP": 78,
    }


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_stops_or_fails(kind: type[BatonError]) -> None:
    expected = ExitStatus.STOP if issubclass(kind, StopError) else ExitStatus.FAILED
    assert kind.exit_status == expected


def test_the_drawn_tree_shows_every_error_and_its_status() -> None:
    drawn = errors.__doc__ or ""
    for kind in KINDS:
        assert re.search(rf"\b{kind.__name__}\b", drawn), kind.__name__


def test_nobody_exits_with_a_number_of_his_own() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "sys.exit",
                "exit",
                "os._exit",
                "SystemExit",
            ):
                literal = [arg for arg in node.args if isinstance(arg, ast.Constant)]
                assert not literal, f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_a_config_error_keeps_its_problems_apart() -> None:
    error = errors.ConfigError(["one", "two"])
    assert error.problems == ["one", "two"]
    assert str(error) == "one\ntwo"
    assert errors.ConfigError("one").problems == ["one"]
