"""Decoding: every annotation, every message, and the round trip."""

from __future__ import annotations

import contextlib
import enum
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NewType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config.decode import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    above,
    at_least,
    at_most,
    between,
    decode,
    encode,
)
from baton.config.yaml import load_yaml
from baton.errors import ConfigError

Tokens = NewType("Tokens", int)
Rank = NewType("Rank", Annotated[int, at_least(1)])


class Precision(enum.Enum):
    BF16 = "bf16"
    FP32 = "fp32"


@dataclass(frozen=True, kw_only=True)
class PathModel:
    source: Literal["path"] = "path"
    folder: Path


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    source: Literal["random", "tiny"]
    layers: Annotated[int, at_least(1)] = 2


@dataclass(frozen=True, kw_only=True)
class Train:
    learning_rate: Annotated[float, Positive]
    warmup_steps: Annotated[int, NonNegative] = 0
    max_steps: int = 100
    dropout: Annotated[float, Fraction] = 0.0
    precision: Precision = Precision.BF16

    def __post_init__(self) -> None:
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps must not exceed max_steps, got {self.warmup_steps} "
                f"and {self.max_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str
    model: PathModel | RandomModel
    train: Train
    samples: Count = 1000
    tags: tuple[str, ...] = ()
    axes: dict[str, list[int]] = field(default_factory=dict)


# Wide: one field for each annotation, to decode single values with.
@dataclass(frozen=True, kw_only=True)
class Wide:
    text: str = ""
    whole: int = 0
    number: float = 0.0
    flag: bool = False
    folder: Path = Path("x")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    bits: Literal[4, 8] = 4
    only: Literal["path"] = "path"
    precision: Precision = Precision.BF16
    optional: float | None = None
    files: str | list[str] = ""
    workers: int | Literal["auto"] = "auto"
    bounded: Annotated[int, at_least(1)] | Literal["auto"] = "auto"
    items: list[int] = field(default_factory=list)
    names: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    sizes: dict[str, int] = field(default_factory=dict)
    by_optimizer: dict[Literal["adamw", "sgd"], int] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    anything: Any = None
    count: Count = 0
    counts: Count | Literal["all"] = "all"
    some: Annotated[Count, at_least(1)] = 1
    tokens: Tokens = Tokens(0)
    rank: Rank = Rank(1)
    limited: Annotated[int | None, between(2, 4)] = None
    high: Annotated[float, above(0), at_most(10)] = 1.0
    model: PathModel | RandomModel | None = None
    train: Train | None = None
    switch: Train | Literal["none"] = "none"
    trains: list[Train] = field(default_factory=list)
    bare_list: list = field(default_factory=list)  # type: ignore[type-arg]
    derived: int = field(default=7, init=False)


def refusal(cls: type, data: Any, **where: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        decode(cls, data, **where)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return str(caught.value)


def test_a_whole_file_decodes(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: medical_qa\nmodel: {source: path, folder: models/qwen}\n"
        "train:\n  learning_rate: 3e-4\n  max_steps: 1e3\n"
        "samples: 20k\ntags: [a, b]\naxes: {size: [1, 2]}\n"
    )
    assert decode(Job, load_yaml(path).data) == Job(
        name="medical_qa",
        model=PathModel(folder=Path("models/qwen")),
        train=Train(learning_rate=3e-4, max_steps=1000),
        samples=20_000,
        tags=("a", "b"),
        axes={"size": [1, 2]},
    )


def test_every_problem_of_a_file_is_reported_in_file_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(
        "nmae: medical_qa\n"  # 1
        "model:\n"  # 2
        "  source: pth\n"  # 3
        "train:\n"  # 4
        "  learning_rte: 3e-4\n"  # 5
        "  dropout: 1.5\n"  # 6
        "  max_steps: fast\n"  # 7
        "samples: 20q\n"  # 8
        "tags:\n"  # 9
        "  - a\n"  # 10
        "  - 2\n"  # 11
        "axes: {size: [1, x]}\n"  # 12
        "colour: red\n"  # 13
    )
    document = load_yaml(Path("job.yaml"))
    assert refusal(Job, document.data, document=document).splitlines() == [
        "job.yaml:1: nmae: unknown key; did you mean 'name'?",
        "job.yaml:1: name: missing key; expected text",
        "job.yaml:3: model.source: expected one of 'path', 'random', 'tiny', got the text 'pth'; "
        "did you mean 'path'?",
        "job.yaml:4: train.learning_rate: missing key; expected a number (above 0)",
        "job.yaml:5: train.learning_rte: unknown key; did you mean 'learning_rate'?",
        "job.yaml:6: train.dropout: must be between 0 and 1, got 1.5",
        "job.yaml:7: train.max_steps: expected a whole number, got the text 'fast'",
        "job.yaml:8: samples: expected a count such as 20000, 20k or 1.5M, got the text '20q'",
        "job.yaml:11: tags[1]: expected text, got the number 2; put it in quotes",
        "job.yaml:12: axes.size[1]: expected a whole number, got the text 'x'",
        "job.yaml:13: colour: unknown key; known keys: name, model, train, samples, tags, axes",
    ]


def test_without_a_document_problems_begin_with_where_or_the_key():
    data = {"learning_rate": "fast"}
    problem = "expected a number, got the text 'fast'"
    assert refusal(Train, data) == f"learning_rate: {problem}"
    assert refusal(Train, data, where="plan.json") == f"plan.json: learning_rate: {problem}"
    assert refusal(Train, data, path=("tasks", 0, "train")) == (
        f"tasks[0].train.learning_rate: {problem}"
    )
    assert refusal(Train, [], where="plan.json") == (
        "plan.json: expected a mapping, got a list of 0 items"
    )
    assert refusal(Train, None) == "expected a mapping, got null"


def test_a_part_of_a_document_is_decoded_with_its_own_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text("name: x\ntrain:\n  learning_rate: 0\n")
    document = load_yaml(Path("job.yaml"))
    part = document.data["train"]
    assert refusal(Train, part, document=document, path=("train",)) == (
        "job.yaml:3: train.learning_rate: must be above 0, got 0.0"
    )


def test_a_rule_across_fields_is_reported_at_the_mapping(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(
        "name: 1\nmodel: {source: tiny}\n"
        "train:\n  learning_rate: 1\n  max_steps: 5\n  warmup_steps: 10\n"
    )
    document = load_yaml(Path("job.yaml"))
    assert refusal(Job, document.data, document=document) == (
        "job.yaml:1: name: expected text, got the number 1; put it in quotes\n"
        "job.yaml:3: train: warmup_steps must not exceed max_steps, got 10 and 5"
    )
    rule = "warmup_steps must not exceed max_steps, got 10 and 5"
    assert refusal(Train, {"learning_rate": 1, "max_steps": 5, "warmup_steps": 10}) == rule


def test_a_rule_across_fields_is_checked_beside_an_unrelated_unknown_key():
    data = {"learning_rate": 1, "max_steps": 5, "warmup_steps": 10, "zzz": 0}
    assert refusal(Train, data) == (
        "zzz: unknown key; known keys: "
        "learning_rate, warmup_steps, max_steps, dropout, precision\n"
        "warmup_steps must not exceed max_steps, got 10 and 5"
    )


def test_a_rule_across_fields_does_not_judge_the_default_behind_a_misspelt_key():
    data = {"learning_rate": 1, "max_stps": 500, "warmup_steps": 200}
    assert refusal(Train, data) == "max_stps: unknown key; did you mean 'max_steps'?"


@pytest.mark.parametrize(
    ("key", "data", "value"),
    [
        ("text", "", ""),
        ("whole", 1e4, 10_000),
        ("whole", -3, -3),
        ("number", 3, 3.0),
        ("number", 3e-4, 3e-4),
        ("flag", True, True),
        ("folder", "a/b", Path("a/b")),
        ("optimizer", "sgd", "sgd"),
        ("bits", 8, 8),
        ("precision", "fp32", Precision.FP32),
        ("optional", None, None),
        ("optional", 1, 1.0),
        ("files", "a", "a"),
        ("files", ["a", "b"], ["a", "b"]),
        ("workers", 4, 4),
        ("workers", "auto", "auto"),
        ("items", [1, 2.0], [1, 2]),
        ("names", ["a"], ("a",)),
        ("betas", [0, 0.5], (0.0, 0.5)),
        ("sizes", {"a": 1}, {"a": 1}),
        ("by_optimizer", {"sgd": 1}, {"sgd": 1}),
        ("free", {"a": [None, {"b": 1}]}, {"a": [None, {"b": 1}]}),
        ("anything", [1, "a"], [1, "a"]),
        ("bare_list", [1, "a"], [1, "a"]),
        ("count", 7, 7),
        ("count", 1e6, 1_000_000),
        ("count", "20k", 20_000),
        ("count", "1.5M", 1_500_000),
        ("count", "1m", 1_000_000),
        ("count", "1.1m", 1_100_000),
        ("count", "0.6B", 600_000_000),
        ("count", "2t", 2_000_000_000_000),
        ("count", "50_000", 50_000),
        ("counts", "20k", 20_000),
        ("counts", "all", "all"),
        ("some", "1k", 1000),
        ("tokens", 5, 5),
        ("rank", 5, 5),
        ("limited", 4, 4),
        ("limited", None, None),
        ("high", 10, 10.0),
        ("model", {"source": "path", "folder": "m"}, PathModel(folder=Path("m"))),
        ("model", {"source": "tiny"}, RandomModel(source="tiny")),
        ("switch", "none", "none"),
        ("switch", {"learning_rate": 1}, Train(learning_rate=1.0)),
        ("trains", [{"learning_rate": 1}], [Train(learning_rate=1.0)]),
    ],
)
def test_a_value_that_fits_its_annotation(key, data, value):
    found = getattr(decode(Wide, {key: data}), key)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("key", "data", "message"),
    [
        ("text", 3, "text: expected text, got the number 3; put it in quotes"),
        ("text", True, "text: expected text, got true; put it in quotes"),
        ("text", None, "text: expected text, got null"),
        ("text", ["a"], "text: expected text, got a list of 1 item"),
        ("whole", 1.5, "whole: expected a whole number, got the number 1.5"),
        ("whole", True, "whole: expected a whole number, got true"),
        ("whole", float("inf"), "whole: expected a whole number, got the number inf"),
        ("whole", "20k", "whole: expected a whole number, got the text '20k'; write 20000"),
        ("number", False, "number: expected a number, got false"),
        ("number", "fast", "number: expected a number, got the text 'fast'"),
        ("number", "3e-4", "number: expected a number, got the text '3e-4'; remove the quotes"),
        (
            "number",
            float("nan"),
            "number: expected a number, got the number nan; write a finite number",
        ),
        (
            "number",
            -float("inf"),
            "number: expected a number, got the number -inf; write a finite number",
        ),
        (
            "number",
            10**400,
            f"number: expected a number, got the number 1{'0' * 58}…; write a finite number",
        ),
        ("flag", 1, "flag: expected true or false, got the number 1"),
        ("flag", "yes", "flag: expected true or false, got the text 'yes'"),
        ("folder", 3, "folder: expected a path, got the number 3"),
        ("folder", "", "folder: expected a path, got the text ''"),
        (
            "optimizer",
            "AdamW8",
            "optimizer: expected one of 'adamw', 'sgd', got the text 'AdamW8'; "
            "did you mean 'adamw'?",
        ),
        ("optimizer", "lion", "optimizer: expected one of 'adamw', 'sgd', got the text 'lion'"),
        ("optimizer", None, "optimizer: expected one of 'adamw', 'sgd', got null"),
        ("bits", 8.0, "bits: expected one of 4, 8, got the number 8.0"),
        ("only", "pat", "only: expected 'path', got the text 'pat'; did you mean 'path'?"),
        (
            "precision",
            "fp23",
            "precision: expected one of 'bf16', 'fp32', got the text 'fp23'; did you mean 'fp32'?",
        ),
        ("optional", "x", "optional: expected a number, got the text 'x'"),
        ("files", 3, "files: expected text or a list, got the number 3; put it in quotes"),
        ("files", ["a", 3], "files[1]: expected text, got the number 3; put it in quotes"),
        (
            "workers",
            "aut",
            "workers: expected a whole number or 'auto', got the text 'aut'; did you mean 'auto'?",
        ),
        (
            "bounded",
            0,
            "bounded: expected a whole number (at least 1) or 'auto', got the number 0",
        ),
        ("items", "a", "items: expected a list, got the text 'a'"),
        ("items", {"a": 1}, "items: expected a list, got a mapping"),
        ("betas", [1, 2, 3], "betas: expected a list of 2 items, got a list of 3 items"),
        ("betas", [1, "x"], "betas[1]: expected a number, got the text 'x'"),
        ("sizes", [1], "sizes: expected a mapping, got a list of 1 item"),
        ("sizes", {"a.b": "x"}, "sizes['a.b']: expected a whole number, got the text 'x'"),
        (
            "by_optimizer",
            {"sdg": 1},
            "by_optimizer.sdg: expected one of 'adamw', 'sgd', got the text 'sdg'; "
            "did you mean 'sgd'?",
        ),
        (
            "count",
            "1.0005k",
            "count: expected a count such as 20000, 20k or 1.5M, got the text '1.0005k'",
        ),
        (
            "counts",
            "al",
            "counts: expected a count such as 20000, 20k or 1.5M or 'all', got the text 'al'; "
            "did you mean 'all'?",
        ),
        ("some", "0", "some: must be at least 1, got 0"),
        ("rank", 0, "rank: must be at least 1, got 0"),
        ("limited", 5, "limited: must be between 2 and 4, got 5"),
        ("high", 0, "high: must be above 0, got 0.0"),
        ("high", 11, "high: must be at most 10, got 11.0"),
        (
            "model",
            {"folder": 3},
            "model.source: missing key; expected one of 'path', 'random', 'tiny'",
        ),
        (
            "model",
            {"source": "random", "folder": "m"},
            "model.folder: unknown key; known keys: source, layers",
        ),
        ("model", "path", "model: expected a mapping or null, got the text 'path'"),
        ("switch", {}, "switch.learning_rate: missing key; expected a number (above 0)"),
        ("switch", "non", "switch: expected a mapping or 'none', got the text 'non'; "
         "did you mean 'none'?"),
        ("trains", [{}], "trains[0].learning_rate: missing key; expected a number (above 0)"),
        ("text", "x" * 100, None),
        ("items", "x" * 100, f"items: expected a list, got the text '{'x' * 59}…'"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_its_annotation(key, data, message):
    if message is None:
        assert getattr(decode(Wide, {key: data}), key) == data
    else:
        assert refusal(Wide, {key: data}) == message


def test_a_field_that_follows_from_others_is_not_a_key():
    assert "derived" not in encode(Wide())
    assert refusal(Wide, {"derived": 1}).startswith("derived: unknown key; known keys: text, whole")


@dataclass(frozen=True, kw_only=True)
class Fork:
    tines: int = 4
    length: int = 20


@dataclass(frozen=True, kw_only=True)
class Place:
    fork: Fork = field(default_factory=lambda: Fork(tines=3))
    spare: Fork | None = field(default_factory=lambda: Fork(length=9))


@dataclass(frozen=True, kw_only=True)
class Table:
    place: Place = field(default_factory=lambda: Place(fork=Fork(tines=2, length=5)))


@pytest.mark.parametrize(
    ("data", "fork", "spare"),
    [
        ({}, Fork(tines=2, length=5), Fork(tines=4, length=9)),
        ({"place": {}}, Fork(tines=2, length=5), Fork(tines=4, length=9)),
        ({"place": {"fork": {"length": 7}}}, Fork(tines=2, length=7), Fork(tines=4, length=9)),
        ({"place": {"spare": {"tines": 1}}}, Fork(tines=2, length=5), Fork(tines=1, length=9)),
        ({"place": {"spare": None}}, Fork(tines=2, length=5), None),
    ],
)
def test_what_a_mapping_does_not_say_stays_as_the_default_around_it_has_it(data, fork, spare):
    assert decode(Table, data).place == Place(fork=fork, spare=spare)


def test_the_result_is_frozen():
    with pytest.raises(FrozenInstanceError):
        decode(Train, {"learning_rate": 1}).max_steps = 3  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    value: set[int] = frozenset()  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Untagged:
    value: Train | Job


@dataclass(frozen=True, kw_only=True)
class Broken:
    def __post_init__(self) -> None:
        raise ZeroDivisionError


def test_mistakes_in_our_own_classes_are_no_config_errors():
    with pytest.raises(TypeError, match=r"value: .* cannot have the annotation set\[int\]"):
        decode(Unsupported, {"value": [1]})
    with pytest.raises(TypeError, match="no Literal field tells Train, Job apart"):
        decode(Untagged, {"value": {}})
    with pytest.raises(TypeError, match="cannot encode"):
        encode({"a": object()})
    with pytest.raises(ZeroDivisionError):
        decode(Broken, {})


def test_encoding_keeps_the_order_of_the_fields_and_writes_every_default():
    train = Train(precision=Precision.FP32, learning_rate=1e-4)
    model = PathModel(folder=Path("m"))
    assert json.dumps(encode(Job(tags=("a",), train=train, model=model, name="x"))) == (
        '{"name": "x", "model": {"source": "path", "folder": "m"}, "train": '
        '{"learning_rate": 0.0001, "warmup_steps": 0, "max_steps": 100, "dropout": 0.0, '
        '"precision": "fp32"}, "samples": 1000, "tags": ["a"], "axes": {}}'
    )


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TRAINS = st.builds(
    Train,
    learning_rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    warmup_steps=st.integers(0, 10),
    max_steps=st.integers(10, 20),
    dropout=st.floats(0, 1),
    precision=st.sampled_from(Precision),
)
MODELS = st.builds(PathModel, folder=st.text("ab./", min_size=1).map(Path)) | st.builds(
    RandomModel, source=st.sampled_from(["random", "tiny"]), layers=st.integers(1)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
WIDES = st.builds(
    Wide,
    text=st.text(),
    whole=st.integers(),
    number=NUMBERS,
    flag=st.booleans(),
    bits=st.sampled_from([4, 8]),
    optional=st.none() | NUMBERS,
    files=st.text() | st.lists(st.text()),
    workers=st.integers() | st.just("auto"),
    items=st.lists(st.integers()),
    names=st.lists(st.text()).map(tuple),
    betas=st.tuples(NUMBERS, NUMBERS),
    sizes=st.dictionaries(st.text(), st.integers()),
    by_optimizer=st.dictionaries(st.sampled_from(["adamw", "sgd"]), st.integers()),
    free=st.dictionaries(st.text(), JSON),
    anything=JSON,
    count=st.integers(0),
    counts=st.integers(0) | st.just("all"),
    limited=st.none() | st.integers(2, 4),
    model=st.none() | MODELS,
    train=st.none() | TRAINS,
    switch=st.just("none") | TRAINS,
    trains=st.lists(TRAINS, max_size=2),
)


@given(WIDES)
def test_decoding_what_was_encoded_gives_an_equal_object(wide):
    through_json = json.loads(json.dumps(encode(wide), allow_nan=False))
    assert decode(Wide, through_json) == wide
    assert encode(decode(Wide, through_json)) == encode(wide)


@given(st.dictionaries(st.sampled_from(list(encode(Wide()))), JSON))
def test_any_data_decodes_or_is_a_config_error(data):
    with contextlib.suppress(ConfigError):
        encode(decode(Wide, data))


def test_decoding_imports_neither_torch_nor_yaml():
    code = "import sys, baton.config.decode; print('torch' in sys.modules, 'yaml' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"
