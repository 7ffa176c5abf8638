"""Which documents a row shows: how often, which, in which order, and that it repeats."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest

from baton.data.chunks import same
from baton.pipelines.raft.config import RaftData
from baton.pipelines.raft.draw import Draw
from baton.pipelines.raft.format import load_format
from baton.pipelines.raft.rows import Row

MEDICAL, BERKELEY = load_format("medical"), load_format("berkeley")
ROWS = 10_000
# Of a normal distribution beyond it: 6e-5, over a few dozen comparisons.
SIGMAS = 4.0


def rows(count: int, *, documents: int = 6, answer: str = "a", absent: str | None = "b"):
    return [
        Row(
            number=number,
            line=number,
            question=f"q{number}",
            documents=tuple(f"row {number} document {i}" for i in range(documents)),
            oracle=number % documents,
            answer=answer,
            absent_answer=absent,
        )
        for number in range(1, count + 1)
    ]


def data(**changes) -> RaftData:
    return RaftData(path="rows.jsonl", **changes)


def within_binomial_bounds(count: int, n: int, p: float) -> bool:
    return abs(count - n * p) <= SIGMAS * math.sqrt(n * p * (1 - p))


@pytest.fixture(scope="module")
def many():
    return rows(ROWS)


@pytest.mark.parametrize("p", [0.2, 0.8])
def test_the_oracle_is_shown_with_probability_p(p, many) -> None:
    draw = Draw(data(p=p), BERKELEY, many)
    shown = [draw.shown(row) for row in many]
    present = sum(s.oracle is not None for s in shown)
    assert within_binomial_bounds(present, ROWS, p)
    for row, s in zip(many, shown, strict=True):
        oracle = row.documents[row.oracle]
        assert (oracle in s.documents) == (s.oracle is not None) == draw.is_present(row)
        assert s.oracle is None or s.documents[s.oracle] == oracle
        assert len(s.documents) == 5
        assert s.target == ("a" if s.oracle is not None else "b")


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0), (1.0, ROWS)])
def test_never_and_always_are_exact(p, expected, many) -> None:
    draw = Draw(data(p=p), BERKELEY, many)
    assert sum(map(draw.is_present, many)) == expected


@pytest.mark.parametrize("distractors", [0, 1, 4])
def test_the_oracle_stands_everywhere_equally_often(distractors, many) -> None:
    draw = Draw(data(p=1.0, distractors=distractors), BERKELEY, many)
    places = Counter(draw.shown(row).oracle for row in many)
    assert set(places) == set(range(distractors + 1))
    for place in places:
        assert within_binomial_bounds(places[place], ROWS, 1 / (distractors + 1))


def test_every_distractor_is_chosen_equally_often(many) -> None:
    draw = Draw(data(p=1.0, distractors=2), BERKELEY, many)
    chosen: Counter[int] = Counter()
    for row in many:
        own = [d for i, d in enumerate(row.documents) if i != row.oracle]
        shown = draw.shown(row)
        chosen.update(own.index(d) for i, d in enumerate(shown.documents) if i != shown.oracle)
    assert sum(chosen.values()) == 2 * ROWS
    for index in range(5):
        assert within_binomial_bounds(chosen[index], ROWS, 2 / 5)


def test_the_order_differs_by_epoch_and_every_order_occurs(many) -> None:
    draw = Draw(data(p=1.0, distractors=2), BERKELEY, many)
    row = many[0]
    orders = Counter(draw.shown(row, epoch=epoch).documents for epoch in range(600))
    assert len(orders) == 6
    assert len({frozenset(order) for order in orders}) == 1, (
        "the documents stay, their order does not"
    )
    for count in orders.values():
        assert within_binomial_bounds(count, 600, 1 / 6)
    same_order = sum(
        draw.shown(r, epoch=0).documents == draw.shown(r, epoch=1).documents for r in many
    )
    assert within_binomial_bounds(same_order, ROWS, 1 / 6)


def test_the_same_seed_shows_the_same_and_another_seed_another(many) -> None:
    few = many[:300]
    first, again = (Draw(data(), BERKELEY, few) for _ in range(2))
    # In another order, as a resumed run may ask.
    shown = {row.number: first.shown(row, epoch=3) for row in few}
    assert {row.number: again.shown(row, epoch=3) for row in reversed(few)} == shown
    other = Draw(data(seed=7), BERKELEY, few)
    assert sum(other.shown(row, epoch=3) == shown[row.number] for row in few) < 30


@pytest.mark.parametrize("present", [True, False])
def test_other_rows_lend_what_is_missing_and_nothing_is_shown_twice(present) -> None:
    few = rows(40, documents=2)
    draw = Draw(data(p=0.5, distractors=4), BERKELEY, few)
    lent = set()
    for row in few:
        shown = draw.shown(row, present=present)
        assert len(shown.documents) == 5
        assert len({same(d) for d in shown.documents}) == 5
        assert (row.documents[row.oracle] in shown.documents) == present
        lent |= set(shown.documents) - set(row.documents)
    assert lent


def test_what_differs_in_white_space_alone_is_lent_to_no_row_that_has_it() -> None:
    a = Row(1, 1, "q", ("x y", "z"), 0, "a", "b")
    b = Row(2, 2, "q", ("x  y", "w"), 0, "a", "b")
    shown = Draw(data(p=0.0, distractors=3), BERKELEY, [a, b]).shown(a)
    assert sorted(map(same, shown.documents)) == ["w", "z"]


def test_a_lone_row_without_its_oracle_shows_no_document() -> None:
    lone = Row(1, 1, "q", ("x",), 0, "a", "b")
    shown = Draw(data(p=0.0), MEDICAL, [lone]).shown(lone)
    assert (shown.documents, shown.oracle, shown.target) == ((), None, "b")


def test_rows_without_an_absent_answer_always_show_their_oracle_unless_told_otherwise() -> None:
    few = rows(50, absent=None)
    assert all(map(Draw(data(p=0.0), BERKELEY, few).is_present, few))
    reference = Draw(data(p=0.0, absent_target="oracle"), BERKELEY, few)
    assert not any(map(reference.is_present, few))
    assert {reference.shown(row).target for row in few} == {"a"}


def test_a_row_without_an_oracle_shows_distractors_alone() -> None:
    row = Row(1, 1, "q", tuple("abcdef"), None, "none of them says", None)
    shown = Draw(data(p=1.0), BERKELEY, [row]).shown(row)
    assert (len(shown.documents), shown.oracle, shown.target) == (5, None, "none of them says")


def test_citations_follow_their_documents_into_every_order() -> None:
    answer = "[文档2]很冷,文档 1、3也一样,见[文档2]。共3个文档。"
    row = Row(1, 1, "q", ("tea", "ice", "snow", "sand", "salt"), 1, answer, "只有[文档4]。")
    draw = Draw(data(p=1.0, distractors=4), MEDICAL, [row])
    seen = set()
    for epoch in range(20):
        shown = draw.shown(row, epoch=epoch)
        numbers = [int(n) for n in re.findall(r"\d+", shown.target)]
        assert [shown.documents[n - 1] for n in numbers[:4]] == ["ice", "tea", "snow", "ice"]
        assert shown.target.endswith("共3个文档。")
        seen.add(shown.documents)
        absent = draw.shown(row, epoch=epoch, present=False)
        [number] = [int(n) for n in re.findall(r"\d+", absent.target)]
        assert absent.documents[number - 1] == "sand"
    assert len(seen) > 10


def test_a_distractor_that_the_target_cites_or_quotes_is_always_shown() -> None:
    cited = [
        Row(n, n, "q", tuple(f"{n} {i}" for i in range(9)), 0, "见[文档1]和[文档9]", "没有")
        for n in range(1, 30)
    ]
    draw = Draw(data(p=1.0, distractors=1), MEDICAL, cited)
    assert all(row.documents[8] in draw.shown(row).documents for row in cited)
    quote = "so: ##begin_quote##the  sea##end_quote##\n<ANSWER>: sea"
    quoted = [
        Row(n, n, "q", (*(f"{n} {i}" for i in range(8)), "by the sea."), 0, quote, "b")
        for n in range(1, 30)
    ]
    draw = Draw(data(p=1.0, distractors=1), BERKELEY, quoted)
    assert all("by the sea." in draw.shown(row).documents for row in quoted)
