"""The data stage of raft: what lies in the token files, and what was left out and counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from chat_families import FAMILIES
from transformers import AutoConfig

from baton.data.tokenise import TokenFile
from baton.errors import DataError
from baton.eval.config import EvalConfig, GenerateConfig
from baton.handover import StopSignal
from baton.identity import this_runner
from baton.legs import utc_now
from baton.pipelines.raft.config import Raft, RaftData
from baton.pipelines.raft.data import prepare, read_test
from baton.pipelines.raft.format import load_format
from baton.record import LegRecord, Plan, TaskPlan
from baton.stage import Alone, Leg, Outcome
from baton.store.local import LocalStore
from baton.train.config import PathModel, TrainConfig

ROWS = 60
FILES = ("train.tokens", "train.index", "dev.tokens", "dev.index", "test.jsonl", "report.json")


def row(number: int) -> dict:
    documents = [
        {"content": f"Fact {number} of kind {kind}. " * (1 + number % 4), "type": "distractor"}
        for kind in range(5)
    ]
    documents[number % 5]["type"] = "oracle"
    quote = f"##begin_quote##Fact {number} of kind {number % 5}.##end_quote##"
    return {
        "question": f"What is {number}?",
        "documents": documents,
        "teacher_answer": f"It says {quote}\n<ANSWER>: {number}",
        "absent_answer": "The documents do not contain it.\n<ANSWER>: nothing",
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a configuration; this stage needs no weights."""
    folder = tmp_path_factory.mktemp("base")
    FAMILIES["qwen2.5"].tokenizer().save_pretrained(folder)
    AutoConfig.for_model("qwen2", max_position_embeddings=4096).save_pretrained(folder)
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path):
    """Prepares rows under a configuration; returns the leg and how the stage ended."""

    def go(rows=None, *, name="task", stop=False, train=None, answer=64, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows or [row(n) for n in range(ROWS)])))
        defaults = {"format": "berkeley", "distractors": 3, "max_length": 1000}
        config = Raft(
            model=PathModel(source="path", path=str(base)),
            data=RaftData(path=str(path), **(defaults | data)),
            train=TrainConfig(**(train or {"epochs": 3.0})),
            eval=EvalConfig(generate=GenerateConfig(max_new_tokens=answer)),
        )
        task = TaskPlan(name=name, config={})
        signal = StopSignal()
        if stop:
            signal._handle(15, None)
        leg = Leg(
            plan=Plan(
                experiment="e", pipeline="raft", digest="0", tasks=[task], created=utc_now(),
                baton_version="0",
            ),
            task=task,
            config=config,
            record=LegRecord(
                task=name, number=1, state="active", runner=this_runner(), started=utc_now(),
                position=[],
            ),
            store=LocalStore(tmp_path / name),
            stop=signal,
            peers=Alone(),
            check_fence=lambda: None,
            now=utc_now,
        )  # fmt: skip
        (tmp_path / name).mkdir(exist_ok=True)
        return leg, prepare(leg)

    return go


def report_of(leg: Leg) -> dict:
    return json.loads(leg.store.read("data/report.json"))


def texts_of(leg: Leg, name: str = "train") -> list[str]:
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    file = TokenFile(leg.folder / "data", name)
    return [tokenizer.decode(file.sample(i)[0]) for i in range(len(file))]


def test_every_epoch_has_every_row_in_an_order_of_its_own(run) -> None:
    leg, outcome = run()
    assert outcome is Outcome.FINISHED
    report = report_of(leg)
    assert (report["versions"], report["rows"]["train"]) == (3, 48)
    assert report["tokens"]["train"]["samples"] == 3 * 48
    texts = texts_of(leg)
    epochs = [texts[start : start + 48] for start in (0, 48, 96)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = list(zip(epochs[one], epochs[other], strict=True))
        # The same row: the same words in another order.
        assert all(sorted(a.split("\n")) == sorted(b.split("\n")) for a, b in pairs)
        assert sum(a != b for a, b in pairs) > 40
    assert len(texts_of(leg, "dev")) == 6


def test_the_same_configuration_writes_the_same_bytes_and_another_seed_others(run) -> None:
    legs = [run(name=name)[0] for name in ("a", "b")]
    a, b = ({f: leg.store.read(f"data/{f}") for f in FILES} for leg in legs)
    assert a == b
    other, _ = run(name="c", seed=7)
    assert other.store.read("data/train.tokens") != a["train.tokens"]


def test_a_handover_half_way_leaves_no_file_and_the_next_leg_makes_the_same(run) -> None:
    whole, _ = run(name="whole")
    leg, outcome = run(name="cut", stop=True)
    assert outcome is Outcome.HANDED_OVER
    assert not any(leg.store.path(f"data/{f}").exists() for f in FILES)
    again, outcome = run(name="cut")
    assert outcome is Outcome.FINISHED
    for file in FILES:
        assert again.store.read(f"data/{file}") == whole.store.read(f"data/{file}")


@pytest.mark.parametrize(
    ("train", "orders", "versions"),
    [({"epochs": 2.5}, 8, 3), ({"epochs": 20.0}, 8, 8), ({"max_steps": 4}, 8, 2), ({}, 1, 1)],
)
def test_there_are_as_many_orders_as_epochs_up_to_a_limit(run, train, orders, versions) -> None:
    leg, _ = run(train=train, orders=orders)
    assert report_of(leg)["versions"] == versions


def test_a_row_that_cannot_fit_is_dropped_from_every_epoch_and_counted(run) -> None:
    rows = [row(n) for n in range(ROWS)]
    for number in range(0, ROWS, 10):
        rows[number]["teacher_answer"] = "So long. " * 150 + rows[number]["teacher_answer"]
    leg, _ = run(rows, max_length=330, p=1.0)
    counts = report_of(leg)["tokens"]
    dropped = counts["train"]["rows_that_cannot_fit"] + counts["dev"]["rows_that_cannot_fit"]
    assert 3 <= dropped <= 6
    assert counts["train"]["documents_shortened"] > 0
    file = TokenFile(leg.folder / "data", "train")
    everything = np.arange(len(file))
    assert (
        len(file)
        == counts["train"]["samples"]
        == 3 * (48 - counts["train"]["rows_that_cannot_fit"])
    )
    assert file.lengths(everything).max() <= 330
    assert file.labelled(everything).min() > 10, "none is all masked"
    for text in texts_of(leg):
        assert "So long." not in text
        assert text.endswith("<|im_end|>")
        quote = text.split("##begin_quote##")[1].split("##end_quote##")[0]
        assert text.count(quote) > 1, "what is quoted still stands in its document"


def test_nothing_that_fits_is_said(run) -> None:
    with pytest.raises(DataError) as caught:
        run(max_length=60)
    assert str(caught.value) == (
        "all 48 train rows were dropped: question, answer and the evidence it quotes are more than"
        " data.max_length (60); raise it"
    )


def test_every_test_row_is_asked_with_and_without_its_oracle(run) -> None:
    leg, _ = run(p=1.0)
    asked = read_test(leg.folder)
    assert report_of(leg)["rows"]["test_prompts"] == len(asked) == 12
    format = load_format("berkeley")
    for present, absent in zip(asked[::2], asked[1::2], strict=True):
        assert absent.number == present.number + 1
        assert present.question == absent.question
        assert (present.oracle is None, absent.oracle is None) == (False, True)
        assert present.documents[present.oracle] not in absent.documents
        assert len(present.documents) == len(absent.documents) == 4
        assert format.admits_absence(absent.reference)
        assert format.quotes_of(present.reference)[0] in present.documents[present.oracle]


def test_tasks_of_another_p_are_asked_the_same(run) -> None:
    legs = [run(name=f"p{p}", p=p)[0] for p in (0.2, 1.0)]
    assert legs[0].store.read("data/test.jsonl") == legs[1].store.read("data/test.jsonl")
    assert report_of(legs[0])["oracle_shown"] < 24 < report_of(legs[1])["oracle_shown"] == 48


def test_rows_without_absent_answers_are_refused_where_p_would_mean_nothing(run) -> None:
    rows = [{k: v for k, v in row(n).items() if k != "absent_answer"} for n in range(ROWS)]
    with pytest.raises(DataError) as caught:
        run(rows)
    assert str(caught.value).startswith(
        "data.p: 0.8 asks for rows without their oracle, but no row"
    )
    assert report_of(run(rows, p=1.0)[0])["oracle_shown"] == 48
    reference, _ = run(rows, absent_target="oracle", name="reference")
    assert 24 < report_of(reference)["oracle_shown"] < 48
    rows[0] = row(0)
    mixed, _ = run(rows, name="mixed")
    assert report_of(mixed)["oracle_always_shown"] in (47, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 5000}, "data.max_length: 5000 is more than the model's context of 4096"),
        ({"answer": 4096}, "eval.generate.max_new_tokens: 4096 leaves no room for a prompt"),
        ({"rows": [row(1)] * 3}, "data.rows: "),
    ],
)
def test_what_cannot_be_prepared_is_said(run, changes, message) -> None:
    with pytest.raises(DataError) as caught:
        run(**changes)
    assert message in str(caught.value)


def test_a_configuration_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError) as caught:
        RaftData(path="x", shares=(0.5, 0.5, 0.5))
    assert "shares must be three positive parts of 1" in str(caught.value)
    assert dataclasses.is_dataclass(Raft)
