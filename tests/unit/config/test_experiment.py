"""Experiments: what a matrix stands for, how its tasks are called, and what `--set` changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config.experiment import Experiment, Point, apply_set, available, nearest
from baton.config.yaml import load_yaml
from baton.errors import ConfigError


def experiment(folder: Path, text: str, *settings: str) -> Experiment:
    path = folder / "exp.yaml"
    path.write_text(text, encoding="utf-8")
    return Experiment.read("exp", apply_set(load_yaml(path), settings))


def points(folder: Path, text: str, *settings: str) -> list[Point]:
    return list(experiment(folder, text, *settings).points())


def names(folder: Path, text: str, *settings: str) -> list[str]:
    return [point.name for point in points(folder, text, *settings)]


def problem(folder: Path, text: str, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        points(folder, text, *settings)
    return str(caught.value).replace(f"{folder}/", "")


def test_without_a_matrix_there_is_one_task_named_like_the_experiment(tmp_path: Path) -> None:
    [point] = points(tmp_path, "pipeline: p\ntrain: {epochs: 2}\n")
    assert (point.name, point.labels) == ("exp", {})
    assert point.document.data == {"train": {"epochs": 2}}


def test_a_task_of_an_experiment_in_a_folder_is_named_without_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("pipeline: p\n")
    assert [p.name for p in Experiment.read("smoke/e", load_yaml(path)).points()] == ["e"]


def test_a_list_labels_each_value_as_it_is_written(tmp_path: Path) -> None:
    found = points(tmp_path, "pipeline: p\nmatrix:\n  data.rows: [20k, 5]\n")
    assert [p.labels for p in found] == [{"rows": "20k"}, {"rows": "5"}]
    assert [p.document.data["data"]["rows"] for p in found] == ["20k", 5]


def test_a_mapping_gives_labels_of_its_own(tmp_path: Path) -> None:
    found = points(tmp_path, "pipeline: p\nmatrix:\n  data.rows: {small: 10, large: 20}\n")
    assert [(p.name, p.document.data) for p in found] == [
        ("small", {"data": {"rows": 10}}),
        ("large", {"data": {"rows": 20}}),
    ]


def test_a_label_may_stand_for_several_settings(tmp_path: Path) -> None:
    text = """
pipeline: p
matrix:
  size:
    small: {train.epochs: 1, data.rows: 10}
    large: {train.epochs: 3, data.rows: 90}
train: {epochs: 7, seed: 5}
"""
    found = points(tmp_path, text)
    assert [p.labels for p in found] == [{"size": "small"}, {"size": "large"}]
    assert found[0].document.data == {"train": {"epochs": 1, "seed": 5}, "data": {"rows": 10}}
    assert found[1].document.data == {"train": {"epochs": 3, "seed": 5}, "data": {"rows": 90}}


def test_a_mapping_under_a_dotted_axis_is_a_value(tmp_path: Path) -> None:
    [point] = points(tmp_path, "pipeline: p\nmatrix:\n  eval.generate: {long: {tokens: 9}}\n")
    assert point.document.data == {"eval": {"generate": {"tokens": 9}}}


def test_axes_multiply_and_the_first_is_slowest(tmp_path: Path) -> None:
    text = "pipeline: p\nmatrix:\n  a.method: [x, y]\n  b.rows: [1, 2]\n"
    assert names(tmp_path, text) == ["x_1", "x_2", "y_1", "y_2"]


def test_points_do_not_share_what_they_change(tmp_path: Path) -> None:
    text = "pipeline: p\nmatrix:\n  a.b.c: [1, 2]\na: {b: {d: [3]}}\n"
    first, second = points(tmp_path, text)
    first.document.data["a"]["b"]["d"].append(4)
    assert second.document.data == {"a": {"b": {"d": [3], "c": 2}}}


def test_a_problem_of_a_matrix_value_has_the_line_of_the_matrix(tmp_path: Path) -> None:
    text = "pipeline: p\nmatrix:\n  train.epochs:\n    a: 1\n    b: two\n"
    _, second = points(tmp_path, text)
    assert second.document.place(("train", "epochs")).endswith("exp.yaml:5")


@given(st.lists(st.integers(1, 4), min_size=0, max_size=4))
def test_the_number_of_tasks_is_the_product_of_the_axes(sizes: list[int]) -> None:
    from baton.config.document import Document

    matrix = {f"a{i}.k{i}": list(range(size)) for i, size in enumerate(sizes)}
    found = list(Experiment("e", "p", Document("e.yaml", {"matrix": matrix}, {})).points())
    product = 1
    for size in sizes:
        product *= size
    assert len({point.name for point in found}) == len(found) == product


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("[a]", "exp.yaml:2: matrix: expected a mapping of axes, got ['a']"),
        (
            "{a.b: 3}",
            "exp.yaml:2: matrix.a.b: expected a list of values or a mapping of labels, got 3",
        ),
        (
            "{a.b: []}",
            "exp.yaml:2: matrix.a.b: expected a list of values or a mapping of labels, got []",
        ),
        ("{a.b: [x, x]}", "exp.yaml:2: matrix.a.b: a label occurs twice"),
        (
            "{a.b: [x/y]}",
            "exp.yaml:2: matrix.a.b: 'x/y' cannot be part of a task name (letters, digits, . _ -);"
            " write `label: value` instead",
        ),
        (
            "{a.b: [1], c.b: [2]}",
            "exp.yaml:2: matrix: two axes end in the same word: b, b",
        ),
    ],
)
def test_a_wrong_matrix_says_where_and_what(tmp_path: Path, matrix: str, expected: str) -> None:
    assert problem(tmp_path, f"pipeline: p\nmatrix: {matrix}\n") == expected


@pytest.mark.parametrize("label", ["..", ".hidden", "a b", "a/b", "-x", "a\\b", "ä", "a" * 101])
def test_a_label_that_would_leave_its_folder_or_need_quoting_is_refused(
    tmp_path: Path, label: str
) -> None:
    text = f"pipeline: p\nmatrix:\n  a.b: {{'{label}': 1}}\n"
    assert "cannot be part of a task name" in problem(tmp_path, text)


def test_a_matrix_key_below_a_value_names_the_matrix_and_not_set(tmp_path: Path) -> None:
    text = "pipeline: p\nmatrix:\n  train.epochs.x: [1]\ntrain: {epochs: 3}\n"
    assert problem(tmp_path, text).startswith("exp.yaml:3: matrix.train.epochs.x")


def test_a_nested_mapping_in_the_matrix_does_not_drop_the_rest_of_its_section(
    tmp_path: Path,
) -> None:
    text = "pipeline: p\nmatrix: {size: {a: {train: {seed: 1}}}}\ntrain: {epochs: 7}\n"
    try:
        [point] = points(tmp_path, text)
    except ConfigError:
        return
    assert point.document.data["train"] == {"epochs": 7, "seed": 1}


def test_a_file_without_a_pipeline_says_so(tmp_path: Path) -> None:
    expected = "exp.yaml:1: pipeline: missing; name one, e.g. medical_qa"
    assert problem(tmp_path, "train: {}\n") == expected


def test_set_changes_a_value_and_later_ones_win(tmp_path: Path) -> None:
    [point] = points(tmp_path, "pipeline: p\ntrain: {a: 1}\n", "train.a=2", "train.a=3e-4")
    assert point.document.data == {"train": {"a": 3e-4}}


def test_set_makes_missing_sections(tmp_path: Path) -> None:
    [point] = points(tmp_path, "pipeline: p\n", "a.b.c=[1, 2]")
    assert point.document.data == {"a": {"b": {"c": [1, 2]}}}


def test_set_keeps_what_stands_after_the_first_equals_sign(tmp_path: Path) -> None:
    [point] = points(tmp_path, "pipeline: p\n", "a.b=x=y")
    assert point.document.data == {"a": {"b": "x=y"}}


def test_set_of_an_axis_replaces_its_values(tmp_path: Path) -> None:
    text = "pipeline: p\nmatrix:\n  data.rows: [20k, 50k]\n  a.m: [x]\n"
    assert names(tmp_path, text, "matrix.data.rows=[1, 2, 3]") == ["1_x", "2_x", "3_x"]


def test_set_of_an_axis_to_nothing_removes_it(tmp_path: Path) -> None:
    text = "pipeline: p\nmatrix:\n  data.rows: [20k, 50k]\n  a.m: [x]\n"
    assert names(tmp_path, text, "matrix.data.rows=") == ["x"]


def test_set_adds_an_axis_even_without_a_matrix(tmp_path: Path) -> None:
    assert names(tmp_path, "pipeline: p\n", "matrix.train.seed={a: 1, b: 2}") == ["a", "b"]


def test_an_axis_wins_over_a_set_of_the_same_key(tmp_path: Path) -> None:
    text = "pipeline: p\nmatrix:\n  data.rows: [1]\n"
    [point] = points(tmp_path, text, "data.rows=9")
    assert point.document.data == {"data": {"rows": 1}}


@pytest.mark.parametrize("setting", ["train.epochs=9", "train={epochs: 9, seed: 5}"])
def test_a_set_wins_over_one_setting_of_a_label_that_stands_for_several(
    tmp_path: Path, setting: str
) -> None:
    text = """
pipeline: p
matrix:
  size:
    small: {train.epochs: 1, data.rows: 10}
    large: {train.epochs: 3, data.rows: 90}
train: {epochs: 7, seed: 5}
"""
    found = points(tmp_path, text, setting)
    assert [p.document.data["train"] for p in found] == [{"epochs": 9, "seed": 5}] * 2
    assert [p.document.data["data"] for p in found] == [{"rows": 10}, {"rows": 90}]


def test_a_set_beside_the_settings_of_a_label_leaves_them_alone(tmp_path: Path) -> None:
    text = "pipeline: p\nmatrix:\n  size:\n    small: {train.epochs: 1, data.rows: 10}\n"
    [point] = points(tmp_path, text, "train.seed=5")
    assert point.document.data["train"] == {"epochs": 1, "seed": 5}


def test_set_leaves_the_document_it_was_given_alone(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("pipeline: p\nmatrix: {a.b: [1]}\ntrain: {x: 1}\n")
    document = load_yaml(path)
    apply_set(document, ["matrix.a.b=[2]", "train.x=2"])
    assert document.data == load_yaml(path).data


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("epochs", "--set epochs: expected key=value, e.g. train.epochs=1"),
        ("=1", "--set =1: expected key=value, e.g. train.epochs=1"),
        ("a..b=1", "--set 'a..b': a name is empty; write it as in 'train.batch_size'"),
        (
            "pipeline.x=1",
            "--set 'pipeline.x': 'pipeline' is not a mapping; set 'pipeline' itself",
        ),
        (
            "matrix.data.rows=20k",
            "--set: matrix.data.rows: expected a list of values or a mapping of labels, got '20k'",
        ),
        (
            "a.b=[1",
            "--set a.b: '[1': not a YAML value: expected ',' or ']', but got the end; close the"
            " bracket, or put the text in quotes",
        ),
    ],
)
def test_a_wrong_set_says_what_to_write(tmp_path: Path, setting: str, expected: str) -> None:
    assert problem(tmp_path, "pipeline: p\n", setting) == expected


def test_available_lists_experiments_of_all_folders(tmp_path: Path) -> None:
    (tmp_path / "smoke").mkdir()
    for name in ("b.yaml", "a.yaml", "smoke/a.yaml", "smoke/notes.txt"):
        (tmp_path / name).write_text("")
    assert available(tmp_path) == ["a", "b", "smoke/a"]


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("qlora_10k", ["lora_20k", "qlora_100k"], "did you mean qlora_100k or lora_20k?"),
        ("zzz", ["a", "b"], "there are: a, b"),
        ("zzz", [], "there are none"),
    ],
)
def test_nearest_names_up_to_three_or_all(word: str, known: list[str], expected: str) -> None:
    assert nearest(word, known) == expected
