"""Which axis of a matrix is a scale of numbers."""

import pytest

from baton.collect.axes import matrix_of, number
from baton.record import TaskPlan


def tasks(axis_labels, config=lambda label: {}):
    """One task for each combination written as a dict of labels."""
    return [
        TaskPlan(name=str(index), labels=labels, config=config(labels))
        for index, labels in enumerate(axis_labels)
    ]


@pytest.mark.parametrize(
    ("label", "value"),
    [("20k", 20_000), ("1.5M", 1_500_000), ("0.8", 0.8), ("1e-4", 1e-4), ("-3", -3)],
)
def test_a_label_that_looks_like_a_number_is_one(label, value):
    assert number(label) == value


@pytest.mark.parametrize("label", ["lora", "r8", "nan", "inf", "", "8bit", "二十"])
def test_a_label_that_is_a_word_is_no_number(label):
    assert number(label) is None


def test_the_scale_is_the_axis_of_numbers_in_ascending_order():
    matrix = matrix_of(
        tasks([{"method": m, "rows": r} for m in ("lora", "qlora") for r in ("100k", "20k")])
    )
    assert matrix.scale.name == "rows"
    assert matrix.scale.labels == ["20k", "100k"]
    assert [axis.name for axis in matrix.others] == ["method"]


def test_the_axis_with_most_numbers_is_the_scale_and_a_seed_never_is():
    matrix = matrix_of(
        tasks(
            [
                {"seed": s, "rank": r, "rows": n}
                for s in ("1", "2", "3", "4")
                for r in ("8", "16")
                for n in ("1k", "2k", "3k")
            ]
        )
    )
    assert matrix.scale.name == "rows"
    assert matrix_of(tasks([{"seed": "1"}, {"seed": "2"}])).scale is None


def test_a_name_for_a_number_is_looked_up_in_the_configuration():
    sizes = {"small": 100, "large": 9000}
    matrix = matrix_of(
        tasks(
            [{"rows": "large"}, {"rows": "small"}],
            config=lambda labels: {"data": {"rows": sizes[labels["rows"]], "seed": 1}},
        )
    )
    assert matrix.scale.labels == ["small", "large"]
    assert matrix.scale.values == {"small": 100, "large": 9000}


def test_words_without_numbers_of_their_name_are_choices():
    matrix = matrix_of(
        tasks(
            [{"method": "lora"}, {"method": "qlora"}],
            config=lambda labels: {"bits": 16 if labels["method"] == "lora" else 4},
        )
    )
    assert matrix.scale is None
    assert matrix.axes[0].values is None


def test_two_labels_for_one_number_are_choices():
    assert matrix_of(tasks([{"rows": "1k"}, {"rows": "1000"}])).scale is None


def test_a_plan_without_labels_has_no_axes():
    matrix = matrix_of(tasks([{}]))
    assert matrix.axes == []
    assert matrix.scale is None
