"""Cleaning: what is dropped, why, and how the report tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.data.quality import Cleaner, Lengths, QualityReport, RejectsWriter, clean
from baton.data.readers import describe
from baton.data.rows import Reject, Row

REAL = Path(__file__).parents[3].parent / "shared" / "data"


def row(number: int, question: str, answer: str = "an answer") -> Row:
    return Row(number, number + 1, {"question": question, "answer": answer})


def reasons(rows: list[Row], min_chars: int = 2, max_chars: int = 10) -> list[str]:
    cleaned = clean(rows, min_chars=min_chars, max_chars=max_chars)
    return [one.reason if isinstance(one, Reject) else "kept" for one in cleaned]


def test_rows_are_stripped_and_lengths_count_after_that() -> None:
    cleaned = list(clean([row(1, "\u3000 ab \r\n")], min_chars=2, max_chars=9))
    assert cleaned == [Row(1, 2, {"question": "ab", "answer": "an answer"})]


def test_every_reason_has_its_own_word() -> None:
    rows = [
        row(1, "ab"),
        row(2, " \n"),
        row(3, "a"),
        row(4, "a" * 11),
        row(5, "abc", ""),
        row(6, "abc", "b"),
        row(7, "abc", "b" * 11),
        row(8, " ab "),
        row(9, "a" * 10),
    ]
    assert reasons(rows) == [
        "kept",
        "empty_question",
        "question_too_short",
        "question_too_long",
        "empty_answer",
        "answer_too_short",
        "answer_too_long",
        "exact_duplicate",
        "kept",
    ]


def test_an_empty_field_is_dropped_even_without_a_minimum() -> None:
    assert reasons([row(1, ""), row(2, "a")], min_chars=0) == ["empty_question", "kept"]


def test_any_field_names_will_do() -> None:
    rows = [Row(1, None, {"text": "x" * 20}), Row(2, None, {"text": "hello"})]
    assert reasons(rows) == ["text_too_long", "kept"]


def test_a_duplicate_is_the_same_in_all_fields_and_the_first_is_kept() -> None:
    rows = [row(1, "ab", "cd"), row(2, "ab", "ce"), row(3, "abc", "d"), row(4, "ab", "cd")]
    rows += [row(5, "a2:", "bb"), row(6, "a", "2:bb"), row(7, "a", "bb")]
    assert reasons(rows, min_chars=1) == ["kept"] * 3 + ["exact_duplicate"] + ["kept"] * 3


def test_a_rejected_row_is_no_reason_to_call_a_later_one_a_duplicate() -> None:
    assert reasons([row(1, "a"), row(2, "a")]) == ["question_too_short"] * 2


def test_details_of_a_reject_say_what_was_found_and_what_is_allowed() -> None:
    long = list(clean([row(3, "长" * 2000)], min_chars=5, max_chars=1024))
    short = list(clean([row(4, "ab")], min_chars=5, max_chars=1024))
    assert long == [
        Reject(
            3,
            4,
            "question_too_long",
            "2,000 characters, at most 1,024 are allowed",
            "长" * 199 + "…",
        )
    ]
    assert short == [
        Reject(4, 5, "question_too_short", "2 characters, at least 5 are needed", "ab")
    ]


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        Cleaner(min_chars=5, max_chars=4)
    assert str(caught.value) == "min_chars must be 0 to max_chars, got 5 and 4"


def test_the_report_counts_everything_that_came_in() -> None:
    cleaner = Cleaner(min_chars=2, max_chars=500)
    rows: list[Row | Reject] = [row(n, "q" * n) for n in range(1, 101)]
    rows += [Reject(101, 102, "broken_row", "1 fields", "x"), row(102, "qq"), row(103, "")]
    list(cleaner.clean(rows))
    report = cleaner.report(encoding="utf-8", columns=("question", "answer"))
    assert report == QualityReport(
        encoding="utf-8",
        columns=("question", "answer"),
        read=103,
        kept=99,
        dropped={"broken_row": 1, "empty_question": 1, "exact_duplicate": 1}
        | {"question_too_short": 1},
        nulls={},
        lengths={
            "question": Lengths(min=2, p5=6, p50=51, p95=96, p99=100, max=100),
            "answer": Lengths(min=9, p5=9, p50=9, p95=9, p99=9, max=9),
        },
        first_rows=tuple({"question": "q" * n, "answer": "an answer"} for n in (2, 3, 4)),
    )
    assert json.loads(json.dumps(report.to_json())) == report.to_json()
    assert report.lines() == [
        "read 103 rows (utf-8; columns question, answer)",
        "kept 99 (96.1%)",
        "dropped 4",
        "          1  broken_row",
        "          1  empty_question",
        "          1  exact_duplicate",
        "          1  question_too_short",
        "question: min 2 · p5 6 · p50 51 · p95 96 · p99 100 · max 100 characters",
        "answer: min 9 · p5 9 · p50 9 · p95 9 · p99 9 · max 9 characters",
        "first rows: question: qq | answer: an answer",
        "first rows: question: qqq | answer: an answer",
        "first rows: question: qqqq | answer: an answer",
    ]


def test_a_report_on_nothing_is_a_report() -> None:
    report = Cleaner(min_chars=1, max_chars=2).report(encoding="utf-8", columns=("text",))
    assert report.lines() == ["read 0 rows (utf-8; columns text)", "kept 0", "dropped 0"]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=300))
def test_quantiles_are_those_of_the_sorted_lengths(lengths: list[int]) -> None:
    cleaner = Cleaner(min_chars=1, max_chars=99)
    # A number in the other field keeps rows of equal length from being duplicates.
    texts = [{"text": "x" * length, "n": str(n)} for n, length in enumerate(lengths)]
    list(cleaner.clean(Row(n, None, values) for n, values in enumerate(texts, start=1)))
    found = cleaner.report(encoding="", columns=()).lengths["text"]
    ordered = sorted(lengths)
    for percent, value in ((5, found.p5), (50, found.p50), (95, found.p95), (99, found.p99)):
        assert sum(length <= value for length in ordered) * 100 >= percent * len(ordered)
        assert sum(length < value for length in ordered) * 100 < percent * len(ordered)
    assert (found.min, found.max) == (ordered[0], ordered[-1])


def test_rejects_are_written_one_a_line_and_kept_rows_pass_on(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    rows: list[Row | Reject] = [
        row(1, "good"),
        Reject(2, 3, "broken_row", "not JSON", "x" * 300),
        Reject(3, None, "bad_unicode", "half a pair", "\ud83d 头"),
        row(4, "also good"),
    ]
    with RejectsWriter(path) as rejects:
        kept = list(rejects.kept(rows))
        assert not path.exists()
    assert kept == [rows[0], rows[3]]
    assert rejects.counts == {"broken_row": 1, "bad_unicode": 1}
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {
            "row": 2,
            "line": 3,
            "reason": "broken_row",
            "detail": "not JSON",
            "excerpt": "x" * 199 + "…",
        },
        {
            "row": 3,
            "line": None,
            "reason": "bad_unicode",
            "detail": "half a pair",
            "excerpt": "\ud83d 头",
        },
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["rejects.jsonl"]


def test_rejects_of_a_run_that_fails_leave_the_earlier_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    path.write_text("earlier\n")

    def broken_file() -> list[Row]:
        with RejectsWriter(path) as rejects:
            rejects.write(Reject(1, 2, "broken_row", "not JSON", "x"))
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        broken_file()
    assert path.read_text() == "earlier\n"
    assert [file.name for file in tmp_path.iterdir()] == ["rejects.jsonl"]


def test_without_rejects_there_is_an_empty_file(tmp_path: Path) -> None:
    with RejectsWriter(tmp_path / "rejects.jsonl"):
        pass
    assert (tmp_path / "rejects.jsonl").read_bytes() == b""


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not beside the checkout")
def test_the_medical_file_is_cleaned_with_every_row_accounted_for(tmp_path: Path) -> None:
    columns = {"question": ["title", "ask"], "answer": "answer"}
    source = describe(REAL / "medical_qa_6000.gb18030.csv", encoding=None, columns=columns)
    cleaner = Cleaner(min_chars=5, max_chars=1024)
    with RejectsWriter(tmp_path / "rejects.jsonl") as rejects:
        kept = list(rejects.kept(cleaner.clean(source.rows())))
    report = cleaner.report(encoding=source.encoding, columns=source.columns)
    assert (report.read, report.kept, report.dropped) == (6000, 5704, {"exact_duplicate": 296})
    assert len(kept) == len({tuple(row.values.values()) for row in kept}) == 5704
    assert len((tmp_path / "rejects.jsonl").read_text("utf-8").splitlines()) == 296
