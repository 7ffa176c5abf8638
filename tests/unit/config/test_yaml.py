"""YAML 1.2 scalars, lines of keys, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config.document import Document
from baton.config.scalar import plain
from baton.config.yaml import load_yaml, parse_scalar
from baton.errors import ConfigError


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load text as the file `job.yaml` of the working directory, so that messages are short."""
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes) -> Document:
        path = Path("job.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_yaml(path)

    return load


@pytest.fixture
def refusal(load):
    def refusal(text: str | bytes) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text)
        return str(caught.value)

    return refusal


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e-4", 1e-4),
        ("1e4", 10000.0),
        ("-.5E+2", -50.0),
        ("1.", 1.0),
        ("24:00:00", "24:00:00"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("012", 12),
        ("-7", -7),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("20k", "20k"),
        ("null", None),
        ("~", None),
        ("", None),
        ("None", "None"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        ("2024-01-02", "2024-01-02"),
        ("1.2.3", "1.2.3"),
        ("=", "="),
        ("٣", "٣"),  # a digit to Python's int, text to YAML
    ],
)
def test_plain_text_means_what_the_core_schema_says(load, text, value):
    found = load(f"key: {text}").data["key"]
    assert (type(found), found) == (type(value), value)
    assert (type(parse_scalar(text)), parse_scalar(text)) == (type(value), value)


def test_nan_is_a_float(load):
    assert math.isnan(load("key: .nan").data["key"])
    assert math.isnan(parse_scalar(".NaN"))


def test_quoted_text_is_text(load):
    assert load("""{a: "1", b: 'true', c: "", d: !!str 12}""").data == {
        "a": "1",
        "b": "true",
        "c": "",
        "d": "12",
    }


def test_keys_are_the_text_that_is_written(load):
    assert load("1e4: a\ntrue: b\non: c\n012: d").data == {
        "1e4": "a",
        "true": "b",
        "on": "c",
        "012": "d",
    }


def test_every_key_and_item_has_its_line(load):
    document = load(
        "# a comment\ntrain:\n  lr: 1\n\n  files:\n    - a\n    - name: b\ndata: {x: 1}"
    )
    assert document.path == "job.yaml"
    assert document.lines == {
        (): 2,
        ("train",): 2,
        ("train", "lr"): 3,
        ("train", "files"): 5,
        ("train", "files", 0): 6,
        ("train", "files", 1): 7,
        ("train", "files", 1, "name"): 7,
        ("data",): 8,
        ("data", "x"): 8,
    }
    assert document.line(("train", "missing", "deeper")) == 2
    assert document.place(("train", "files", 1)) == "job.yaml:7"


def test_merge_keys_fill_in_what_is_not_written(load):
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {z: 3, <<: [*a, *b]}\nd: {<<: *a}\n"
    document = load(text)
    assert document.data["c"] == {"x": 1, "y": 1, "z": 3}
    assert document.data["d"] == {"x": 1, "y": 1}
    assert document.lines["c", "y"] == 1
    assert document.lines["c", "z"] == 3


def test_an_anchor_used_twice_gives_two_mappings(load):
    data = load("a: &a {x: []}\nb: *a").data
    data["a"]["x"].append(1)
    assert data["b"] == {"x": []}


def test_every_duplicate_key_is_reported_with_both_lines(refusal):
    assert refusal("a: 1\nb:\n  c: 1\n  d: 2\n  'c': 3\na: 2\n") == (
        "job.yaml:5: b.c: duplicate key, first on line 3; keep one of them\n"
        "job.yaml:6: a: duplicate key, first on line 1; keep one of them"
    )


def test_a_problem_in_an_anchor_is_reported_once(refusal):
    assert refusal("a: &a {x: 1, x: 2}\nb: {<<: *a}\na.b: {<<: 3}") == (
        "job.yaml:1: a.x: duplicate key, first on line 1; keep one of them\n"
        "job.yaml:1: b.x: duplicate key, first on line 1; keep one of them\n"
        "job.yaml:3: ['a.b']: '<<' takes a mapping or a list of mappings"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a:\n  b: 1\n\tc: 2\n",
            "job.yaml:3:1: the line is indented with a tab, in 'c: 2'; use spaces",
        ),
        (
            "name: a: b\n",
            "job.yaml:1:8: ': ' in a value, in 'name: a: b'; "
            "quote the text, or mend the indentation",
        ),
        (
            "name: @x\n",
            "job.yaml:1:7: found character '@' that cannot start any token, in 'name: @x'; "
            "put the text in quotes",
        ),
        (
            "a: *x\n",
            "job.yaml:1:4: found undefined alias 'x', in 'a: *x'; "
            "put text that begins with * in quotes",
        ),
        (
            "a: 1\nb: [1, 2\n\n",
            "job.yaml:2:4: expected ',' or ']', but got the end, in 'b: [1, 2'; "
            "close the bracket, or put the text in quotes",
        ),
        (
            "a: 'x\nb: 1\n",
            "job.yaml:1:4: these quotes are never closed, in \"a: 'x\"; close them",
        ),
        (
            'a: "C:\\q"',
            "job.yaml:1:8: found unknown escape character 'q', in 'a: \"C:\\\\q\"'; "
            "write two backslashes, or use single quotes",
        ),
        (
            "a: - b\n",
            "job.yaml:1:4: sequence entries are not allowed here, in 'a: - b'; "
            "put the text in quotes, or mend the line",
        ),
        (
            "a: 1\nb\n",
            "job.yaml:2:1: no ':' follows this text, in 'b'; "
            "write 'key: value', or quote the text",
        ),
        (
            "a:\n  - b\n - c\n",
            "job.yaml:3:2: this does not continue the lines above, in '- c'; "
            "mend indents or brackets",
        ),
        (
            "a: 1\n---\nb: 1\n",
            "job.yaml:2:1: a second document begins, in '---'; keep one document in a file",
        ),
        ("a: 1\nb: \x07", "job.yaml:2:4: the character U+0007 is not allowed; remove it"),
        ("a: 1\nb: caf\xe9".encode("latin-1"), "job.yaml:2: not UTF-8: byte 0xe9 at position 11; "
         "save the file as UTF-8"),
        ("", "job.yaml: the file is empty; expected 'key: value' lines"),
        ("# only this\n", "job.yaml: the file is empty; expected 'key: value' lines"),
        (
            "\n- a\n",
            "job.yaml:2: the top level is a list; expected a mapping ('key: value' lines)",
        ),
        (
            "hello",
            "job.yaml:1: the top level is a single value; expected a mapping ('key: value' lines)",
        ),
        ("a: {{ x }}", "job.yaml:1: a: a key must be text; put '{…}' or '[…]' in quotes"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "job.yaml:1: a: the tag !!python/object/apply:os.system is not supported; remove it",
        ),
        ("a: &x [*x]", "job.yaml:1: a[0]: the anchor contains itself; write the value out"),
        ("[" * 3000, "job.yaml: nested too deeply to be read; flatten it"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(refusal, text, message):
    assert refusal(text) == message


def test_long_lines_are_cut_in_messages(refusal):
    assert refusal("a: @" + "x" * 100) == (
        "job.yaml:1:4: found character '@' that cannot start any token, "
        f"in 'a: @{'x' * 55}…'; put the text in quotes"
    )


def test_a_missing_file_or_a_folder_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as missing:
        load_yaml(Path("job.yaml"))
    assert str(missing.value) == "job.yaml: no such file"
    with pytest.raises(ConfigError) as folder:
        load_yaml(Path("."))
    assert str(folder.value) == ".: cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[a, 1, 3e-4]", ["a", 1, 3e-4]),
        ("{a: {b: [1]}}", {"a": {"b": [1]}}),
        ("'12'", "12"),
        ("a b", "a b"),
        (" 12 ", 12),
        ("Answer: yes", "Answer: yes"),
        ("- x", "- x"),
        ("#5", "#5"),
        ("s3://bucket/a", "s3://bucket/a"),
        (" ", None),
    ],
)
def test_a_value_of_set_is_read_by_the_same_rules(text, value):
    assert parse_scalar(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[1, 2",
            "'[1, 2': not a YAML value: expected ',' or ']', but got the end; "
            "close the bracket, or put the text in quotes",
        ),
        (
            "*.txt",
            "'*.txt': not a YAML value: not the name of an anchor; "
            "put text that begins with * or & in quotes",
        ),
        (
            "a\x07",
            "'a\\x07': not a YAML value: a character that YAML does not allow; remove it",
        ),
        (
            "{a: 1, a: 2}",
            "'{a: 1, a: 2}', line 1: a: duplicate key, first on line 1; keep one of them",
        ),
    ],
)
def test_a_value_of_set_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_scalar(text)
    assert str(caught.value) == message


# YAML 1.1 ends a line where Unicode separates lines and paragraphs (Zl, Zp); JSON does not.
JSON_TEXT = st.text(
    st.characters(min_codepoint=32, max_codepoint=0xD7FF, exclude_categories=["C", "Zl", "Zp"])
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | JSON_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(JSON_TEXT, inner),
    max_leaves=10,
)


@given(JSON)
def test_json_is_yaml(value):
    assert parse_scalar(json.dumps(value, ensure_ascii=False)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_python_prints_is_read_back(value):
    assert plain(repr(value)) == value


@given(st.text())
def test_any_text_is_a_value_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        parse_scalar(text)
