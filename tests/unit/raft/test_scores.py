"""Scores of answers whose right values are known by hand."""

from __future__ import annotations

import pytest

from baton.eval.qa import exact_match, f1
from baton.pipelines.raft.format import load_format
from baton.pipelines.raft.sample import sample_rows
from baton.pipelines.raft.scores import Given, judge, score_answers

MEDICAL, BERKELEY = load_format("medical"), load_format("berkeley")
TEA, ICE, SEA = "Tea is hot.", "Ice is cold and hard.", "The sea is wide."


def quoted(*quotes: str, final: str) -> str:
    marks = " and ".join(f"##begin_quote##{quote}##end_quote##" for quote in quotes)
    return f"It says {marks}.\n<ANSWER>: {final}"


PRESENT = [
    # Cites the oracle, two quotes of two found, right.
    (quoted("Ice is cold", "Tea is hot.", final="cold"), "cold"),
    # Quotes a distractor only: one of one found, oracle not cited; partly right.
    (quoted("Tea is hot.", final="the cold ice"), "cold"),
    # One quote of two invented.
    (quoted("Ice is  cold\nand hard.", "Ice is warm", final="warm"), "cold"),
    # No structure, no quote, gives up although the oracle is there.
    ("The documents do not contain enough information.", "cold"),
]
ABSENT = [
    # Admits, quoting what there is.
    (quoted("The sea is wide.", final="not in the documents") + " do", "not in the documents"),
    ("Documents do not provide it.\n<ANSWER>: not in the documents", "not in the documents"),
    # Makes it up: the oracle's sentence is in none of the documents shown.
    (quoted("Ice is cold and hard.", final="cold"), "not in the documents"),
]


def scores(format=BERKELEY, present=PRESENT, absent=ABSENT):
    answers = [answer for answer, _ in (*present, *absent)]
    given = [
        Given(documents=(TEA, ICE), oracle=1, reference=f"<ANSWER>: {r}") for _, r in present
    ] + [Given(documents=(TEA, SEA), oracle=None, reference=f"<ANSWER>: {r}") for _, r in absent]
    sheet = score_answers(answers, given, format, seed=0, resamples=200)
    return {score.column: score for score in sheet.scores}


def test_every_score_of_a_constructed_set_is_what_it_is_by_hand() -> None:
    found = scores()
    values = {column: (score.value, score.n) for column, score in found.items()}
    assert (
        values.items()
        >= {
            "faithfulness_present": (4 / 5, 5),
            "oracle_cited_present": (2 / 4, 4),
            "absence_admitted_present": (1 / 4, 4),
            "structure_present": (3 / 4, 4),
            "quoted_present": (3 / 4, 4),
            "exact_match_present": (1 / 4, 4),
            # 1; 2·1/(2+1) of "cold ice"; 0; 0 of the whole text without a marker.
            "f1_present": pytest.approx(((1 + 2 / 3) / 4, 4)),
            "faithfulness_absent": (1 / 2, 2),
            "absence_admitted_absent": (1 / 3, 3),
            "structure_absent": (1.0, 3),
            "quoted_absent": (2 / 3, 3),
            "exact_match_absent": (1 / 3, 3),
        }.items()
    )
    assert "oracle_cited_absent" not in found
    for score in found.values():
        assert score.low <= score.value <= score.high
        assert score.convention


def test_text_scores_are_those_of_medical_qa_within_each_group() -> None:
    from baton.eval.score import score_pairs

    found = scores()
    for name, pairs in (("present", PRESENT), ("absent", ABSENT)):
        sheet = score_pairs(
            [answer for answer, _ in pairs],
            [f"<ANSWER>: {reference}" for _, reference in pairs],
            seed=0,
            resamples=200,
        )
        assert sheet.scores
        for score in sheet.scores:
            assert found[f"{score.column}_{name}"].value == score.value


def test_a_perfect_student_scores_one_everywhere() -> None:
    rows = sample_rows("medical")
    given = [Given(documents=r.documents, oracle=r.oracle, reference=r.answer) for r in rows]
    for row in rows:
        shown = tuple(d for i, d in enumerate(row.documents) if i != row.oracle)
        given.append(Given(documents=shown, oracle=None, reference=row.absent_answer or ""))
    answers = [g.reference for g in given]
    sheet = score_answers(answers, given, MEDICAL, seed=0, resamples=200)
    shares = {s.column: s.value for s in sheet.scores if not s.library}
    assert shares.pop("absence_admitted_present") == 0.0
    assert set(shares) == {
        "faithfulness_present",
        "oracle_cited_present",
        "structure_present",
        "quoted_present",
        "faithfulness_absent",
        "absence_admitted_absent",
        "structure_absent",
        "quoted_absent",
    }
    assert set(shares.values()) == {1.0}


def test_where_nothing_is_quoted_there_is_no_faithfulness_to_report() -> None:
    found = scores(present=[("<ANSWER>: cold", "cold")], absent=[])
    assert "faithfulness_present" not in found
    assert found["quoted_present"].value == 0.0
    assert not any(column.endswith("_absent") for column in found)


WHOLE = sample_rows("medical")[0].answer


def swapped(a: str, b: str) -> str:
    return WHOLE.replace(a, "@@").replace(b, a).replace("@@", b)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (WHOLE, True),
        (WHOLE.replace("问题\n", "## 问题\n", 1), True),
        (WHOLE.replace("CoT推理", "**3. CoT推理:**"), True),
        (WHOLE.replace("紧急就医指示(红旗症状)", "【紧急就医指示（红旗症状）】"), True),
        (WHOLE.replace("证据引用\n", "五、证据引用：\n"), True),
        (WHOLE.replace("CoT推理\n", ""), False),
        (swapped("CoT推理", "证据引用"), False),
        (WHOLE + "\n证据引用\n再说一遍。", False),
        (WHOLE + "\n问题是血压。", True),
        (WHOLE.replace("\n", " "), False),
        ("", False),
    ],
)
def test_structure_is_seven_headings_each_once_in_order(answer: str, expected: bool) -> None:
    assert MEDICAL.is_structured(answer) is expected


def test_only_evidence_counts_as_a_quote_in_the_medical_format() -> None:
    answer = WHOLE.replace("患者为成人", "所谓“三高”患者为成人")
    assert MEDICAL.quotes_of(answer) == ["每人每日食盐摄入量逐步降至5克以下"]
    assert MEDICAL.quotes_of(answer.replace("以下”", "以下")) == [""]


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("[文档2]和[文档 13]", {2, 13}),
        ("根据文档1、3，以及[文档5]", {1, 3, 5}),
        ("文档里没有2个", set()),
        ("共3份文档", set()),
    ],
)
def test_citations_are_found_however_they_are_written(answer: str, numbers: set[int]) -> None:
    assert MEDICAL.cited(answer) == numbers
    assert BERKELEY.cited(answer) == set()


def test_an_oracle_is_cited_by_number_or_by_a_quote() -> None:
    documents = ("天很蓝。", "海很宽。")
    by_number = "证据引用\n见[文档2]"
    by_quote = "证据引用\n“海很宽。”"
    for answer in (by_number, by_quote):
        assert judge(answer, documents, oracle=1, format=MEDICAL).cites_oracle
        assert not judge(answer, documents, oracle=0, format=MEDICAL).cites_oracle
        assert not judge(answer, documents, oracle=None, format=MEDICAL).cites_oracle


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("a <ANSWER>: b <ANSWER>: c d ", "c d"),
        ("no marker at all", "no marker at all"),
        ("<ANSWER>:tight", "tight"),
    ],
)
def test_the_final_answer_follows_the_last_marker(text: str, final: str) -> None:
    assert BERKELEY.final_answer(text) == final


@pytest.mark.parametrize(
    ("prediction", "reference", "em", "overlap"),
    [
        ("The Cat!", "cat", 1.0, 1.0),
        ("a cat and a dog", "cat", 0.0, 2 * 1 / (3 + 1)),
        ("cat cat", "cat", 0.0, 2 / 3),
        ("每日5克以下", "5克以下。", 0.0, 2 * 4 / (6 + 4)),
        ("", "cat", 0.0, 0.0),
        ("the", "!", 1.0, 1.0),
    ],
)
def test_short_answers_are_scored_as_squad_scores_them(
    prediction: str, reference: str, em: float, overlap: float
) -> None:
    assert exact_match(prediction, reference) == em
    assert f1(prediction, reference) == pytest.approx(overlap)
