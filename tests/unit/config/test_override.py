"""`--set key=value`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from baton.config.decode import decode
from baton.config.document import Document
from baton.config.override import override, set_key
from baton.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    train: Train
    name: str


DOCUMENT = Document(
    path="job.yaml",
    data={"name": 3, "train": {"steps": 10}},
    lines={(): 1, ("name",): 1, ("train",): 2, ("train", "steps"): 3},
)


def refusal(document: Document) -> str:
    with pytest.raises(ConfigError) as caught:
        decode(Job, document.data, document=document)
    return str(caught.value)


def test_a_key_is_changed_or_made_with_the_mappings_around_it():
    data = {"train": {"rate": 1, "keep": 2}, "adapter": None}
    set_key(data, "train.rate", 3)
    set_key(data, "adapter.rank", 8)
    set_key(data, "a.b.c", [1])
    set_key(data, "name", "x")
    assert data == {
        "train": {"rate": 3, "keep": 2},
        "adapter": {"rank": 8},
        "a": {"b": {"c": [1]}},
        "name": "x",
    }


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "train.files.first",
            "--set 'train.files.first': 'train.files' is not a mapping; set 'train.files' itself",
        ),
        ("train..rate", "--set 'train..rate': a name is empty; write it as in 'train.batch_size'"),
        ("", "--set '': a name is empty; write it as in 'train.batch_size'"),
    ],
)
def test_a_key_that_cannot_be_set_is_refused(key, message):
    data = {"train": {"files": ["a"]}}
    with pytest.raises(ConfigError) as caught:
        set_key(data, key, 1)
    assert str(caught.value) == message
    assert data == {"train": {"files": ["a"]}}


def test_a_problem_of_an_overridden_key_does_not_blame_the_file():
    changed = override(DOCUMENT, "train.steps", "fast")
    assert refusal(changed) == (
        "--set: train.steps: expected a whole number, got the text 'fast'\n"
        "job.yaml:1: name: expected text, got the number 3; put it in quotes"
    )
    assert DOCUMENT.data["train"] == {"steps": 10}


def test_a_problem_inside_an_overridden_mapping_does_not_blame_the_file():
    changed = override(override(DOCUMENT, "name", "x"), "train", {"stepz": 1})
    assert refusal(changed) == (
        "--set: train.stepz: unknown key; did you mean 'steps'?\n"
        "--set: train.steps: missing key; expected a whole number"
    )
