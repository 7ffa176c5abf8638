"""The JSON that baton promises to others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.errors import DamagedError, NewerSchemaError
from baton.record import (
    SCHEMA,
    EvalRecord,
    FileEntry,
    LegRecord,
    Manifest,
    PerSample,
    Plan,
    Record,
    Runner,
    dump_json,
)

RUNNER = Runner(host="h", pid=1, started_ticks=2, boot="b", pid_namespace="n")
RECORDS: list[Record] = [
    Plan(experiment="e", pipeline="p", digest="d", tasks=[], created="c", baton_version="v"),
    LegRecord(task="t", number=1, state="active", runner=RUNNER, started="s", position=[0, 5, 0]),
    Manifest(step=5, leg=1, created="c", files=[FileEntry(name="a/b", size=3, sha256="00")]),
    PerSample(rows=[1], scores={"x": [0.5]}, bleu_statistics=[[1, 2]]),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_survives_its_json(record: Record) -> None:
    again = type(record).from_json(record.to_json(), where="it")
    assert again == record
    assert again.to_json() == record.to_json()
    assert record.to_json().endswith(b"}\n")


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_newer_schema_is_refused_whatever_else_it_holds(record: Record) -> None:
    values = json.loads(record.to_json()) | {"schema": SCHEMA + 1, "unheard_of": 1}
    with pytest.raises(NewerSchemaError) as caught:
        type(record).from_json(dump_json(values), where="here.json")
    assert str(caught.value) == (
        "here.json: written by a newer baton (schema 2, this one knows 1); upgrade baton to read it"
    )


@pytest.mark.parametrize("kind", [Plan, LegRecord, Manifest, EvalRecord, PerSample])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"\0" * 64, b'{"schema": 1', b"nul"])
def test_bytes_that_are_no_json_are_called_damaged(kind: type[Record], data: bytes) -> None:
    with pytest.raises(DamagedError) as caught:
        kind.from_json(data, where="x.json")
    assert str(caught.value).startswith("x.json: not JSON")
    assert str(caught.value).endswith("it was damaged or cut off")


@pytest.mark.parametrize("kind", [Plan, LegRecord, Manifest, EvalRecord, PerSample])
@pytest.mark.parametrize("data", [b"[]", b"null", b"1", b'"x"', b"{}", b'{"schema": "one"}'])
def test_json_of_something_else_is_called_damaged(kind: type[Record], data: bytes) -> None:
    with pytest.raises(DamagedError) as caught:
        kind.from_json(data, where="x.json")
    assert str(caught.value).startswith("x.json: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_never_written(value: float) -> None:
    with pytest.raises(ValueError):
        dump_json({"loss": value})


def test_chinese_text_is_written_to_be_read() -> None:
    value: Any = {"question": "头痛"}
    assert "头痛".encode() in dump_json(value)
