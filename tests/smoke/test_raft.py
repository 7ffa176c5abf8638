"""A student that learns 64 rows by heart, preempted on the way: what it leaves, what it answers."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent))

import overfit

from baton.cli import cli
from baton.config.decode import decode
from baton.errors import BatonError
from baton.record import EvalRecord, Plan

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "BATON_HOME": str(REPOSITORY),
    "BATON_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Student:
    """One finished task, `fit`."""

    experiment: Path
    store: Path
    out: str

    @property
    def words(self) -> list[str]:
        return ["--task", str(self.experiment), "--store", str(self.store)]

    @property
    def folder(self) -> Path:
        [plan] = self.store.glob("*/*/plan.json")
        return plan.parent / "tasks" / "fit"

    @property
    def plan(self) -> Plan:
        path = self.folder.parents[1] / "plan.json"
        return Plan.from_json(path.read_bytes(), where=str(path))


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Trained once for all tests, whichever worker of xdist they run on."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place = base / "student"
    place.mkdir(exist_ok=True)
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "out.txt").exists():
            experiment = overfit.write(place)
            words = ["--store", str(place / "runs"), "--drill", "fit=TERM@100"]
            done = subprocess.run(
                [sys.executable, "-m", "baton", "submit", str(experiment), *words],
                env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            (place / "out.txt").write_text(done.stdout)
    return Student(place / "fit.yaml", place / "runs", (place / "out.txt").read_text())


def test_training_went_through_a_preemption(student: Student) -> None:
    assert "fit: drill: SIGTERM at step" in student.out
    assert "fit: handed over, step" in student.out
    legs = [json.loads(path.read_bytes()) for path in sorted(student.folder.glob("legs/*.json"))]
    assert [leg["state"] for leg in legs] == ["handed_over", "finished"]
    assert legs[1]["from_step"] == legs[0]["durable_step"] >= 100


def test_a_student_that_learnt_64_rows_by_heart_is_structured_and_faithful(
    student: Student,
) -> None:
    scores = overfit.scores_on_training_rows(student.plan, student.folder)
    for group in ("present", "absent"):
        assert scores[f"structure_{group}"].value >= 0.95
        assert scores[f"faithfulness_{group}"].value >= 0.9
    assert scores["oracle_cited_present"].value >= 0.9
    assert scores["absence_admitted_absent"].value >= 0.9
    assert scores["absence_admitted_present"].value <= 0.1
    assert scores["structure_present"].n + scores["structure_absent"].n == 64


def test_test_rows_were_asked_with_and_without_their_oracle(student: Student) -> None:
    record = EvalRecord.from_json((student.folder / "eval" / "eval.json").read_bytes(), where="")
    scores = {score.column: score for score in record.scores}
    assert scores["structure_present"].n == scores["structure_absent"].n == 8
    assert record.data["rows"] == {
        "pool": 80,
        "train": 64,
        "dev": 8,
        "test": 8,
        "test_prompts": 16,
        "test_prompts_that_cannot_fit": 0,
    }
    lines = (student.folder / "eval" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sum(row["oracle"] is None for row in rows) == 8
    assert all(len(row["documents"]) == 3 for row in rows)


def test_the_final_adapter_loads_with_plain_peft_and_says_the_same(student: Student) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = student.folder / "train" / "final"
    base = AutoModelForCausalLM.from_pretrained(student.folder / "base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, final).eval()
    assert plain.peft_config["default"].r == 64
    tokenizer = AutoTokenizer.from_pretrained(final)
    chat = overfit.chat_of(student.plan, student.folder)
    tokens = tokenizer("琥珀在山顶多吗?", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        ours, theirs = chat.model(input_ids=tokens).logits, plain(input_ids=tokens).logits
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3)


def test_the_resolved_configuration_and_the_curves_stand_beside_the_model(
    student: Student,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    about = json.loads((student.folder / "train" / "final" / "task.json").read_bytes())
    assert about["config"] == student.plan.task("fit").config
    assert about["notice"].startswith("RANDOM WEIGHTS")
    assert about["step"] == max(int(p.name[5:]) for p in student.folder.glob("train/checkpoints/*"))
    board = EventAccumulator(str(student.folder / "train" / "tensorboard"))
    board.Reload()
    losses = board.Scalars("loss")
    assert [event.step for event in losses] == list(range(20, 401, 20))
    assert losses[-1].value < losses[0].value / 5
    assert [event.step for event in board.Scalars("dev_loss")] == [400]


# --- the command line ---------------------------------------------------------------------------


def baton(*words: str) -> Result:
    """A command in this process; torch is loaded once for all of them."""
    return CliRunner().invoke(cli, words, catch_exceptions=True)


def answers(*words: str) -> list[dict[str, Any]]:
    done = baton("generate", *words, "--json")
    assert done.exception is None, done.exception
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def question_with_documents(student: Student, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Words that ask what the student learnt with its oracle in the first place, and the row."""
    shown, row = overfit.shown_training_row(student.plan, student.folder)
    words = ["--question", row.question]
    for number, text in enumerate(shown.documents):
        path = folder / f"{number}.md"
        path.write_text(text, encoding="utf-8")
        words += ["--document", str(path)]
    return words, {"documents": list(shown.documents), "answer": shown.target}


def without_numbers(answer: str) -> str:
    """Which place a document stands in is the one thing that cannot be learnt by heart."""
    return re.sub(r"文档\d", "文档", answer)


def test_a_question_is_answered_from_its_documents(student: Student, tmp_path: Path) -> None:
    asked, learnt = question_with_documents(student, tmp_path)
    [greedy] = answers(*student.words, *asked, "--greedy")
    assert greedy["documents"] == learnt["documents"]
    assert without_numbers(greedy["answer"]) == without_numbers(learnt["answer"])
    shown = baton("generate", *student.words, *asked, "--greedy")
    assert shown.stdout.strip() == greedy["answer"]
    assert shown.stderr.startswith("greedy, at most 256 new tokens")
    # Draws repeat with their seed.
    few = ["--temperature", "3", "--max-new-tokens", "20"]
    drawn = [answers(*student.words, *asked, *few, "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_rows_of_a_file_are_answered_one_by_one(student: Student, tmp_path: Path) -> None:
    lines = (student.experiment.parent / "rows.jsonl").read_text().splitlines()[:2]
    (path := tmp_path / "two.jsonl").write_text("\n".join(lines))
    found = answers(*student.words, "--file", str(path), "--max-new-tokens", "4")
    assert [f["question"] for f in found] == [json.loads(line)["question"] for line in lines]
    assert [f["reference"] for f in found] == [json.loads(line)["teacher_answer"] for line in lines]
    path.write_text(lines[0].replace('"question"', '"qestion"'))
    done = baton("generate", *student.words, "--file", str(path))
    assert isinstance(done.exception, BatonError)
    assert str(done.exception).startswith(f"{path}:1: question: missing; did you mean qestion?")


def test_what_cannot_be_asked_is_said(student: Student, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        done = baton("generate", *words)
        assert isinstance(done.exception, BatonError), done.exception
        return str(done.exception)

    assert "--document needs a --question" in refused(*student.words, "--document", "x.md")
    assert "give one or the other" in refused(*student.words, "--file", "f", "--question", "q")
    assert "cannot go with --top-k" in refused(*student.words, "--greedy", "--top-k", "3")
    assert "temperature" in refused(*student.words, "--temperature", "-1")
    too_long = refused(*student.words, "--question", "q", "--max-new-tokens", "512")
    assert too_long == (
        "--max-new-tokens 512 leaves no room for a question in the model's context of 512 tokens"
    )
    elsewhere = ["--task", str(student.experiment), "--store", str(tmp_path)]
    assert "has no checkpoint in" in refused(*elsewhere)
    # A format of one's own has no samples of its own.
    assert "there are no sample rows of the format" in refused(*student.words)


def test_on_a_terminal_the_answer_appears_as_it_is_written(
    student: Student, tmp_path: Path
) -> None:
    asked, learnt = question_with_documents(student, tmp_path)
    words = ["generate", *student.words, *asked, "--greedy"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "baton", *words],
        stdout=slave, stderr=subprocess.DEVNULL, env=ENVIRONMENT, cwd=REPOSITORY,
    )  # fmt: skip
    os.close(slave)
    pieces = []
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(master)
    assert process.wait(timeout=60) == 0
    text = b"".join(pieces).decode().replace("\r\n", "\n")
    assert without_numbers(text.strip()) == without_numbers(learnt["answer"])
    assert len(pieces) > 3, "it came in one piece"


def test_a_finished_task_is_exported_as_a_folder_and_as_a_zip(
    student: Student, tmp_path: Path
) -> None:
    task = [str(student.experiment), "--store", str(student.store)]
    done = baton("export", *task, "--out", str(tmp_path / "student"))
    assert done.exception is None
    final = student.folder / "train" / "final"
    names = sorted(path.name for path in final.iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors", "task.json"} <= set(names)
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == names
    for name in names:
        copy = tmp_path / "student" / name
        assert copy.read_bytes() == (final / name).read_bytes()
        assert copy.stat().st_nlink == 1, "an edit must not reach the store"
    for name in ("a.zip", "b.zip"):
        assert baton("export", *task, "--out", str(tmp_path / name)).exception is None
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == names
    taken = baton("export", *task, "--out", str(tmp_path / "student"))
    assert "something is there already" in str(taken.exception)
    none = baton("export", task[0], "--store", str(tmp_path / "none"), "--out", str(tmp_path / "n"))
    assert "has no final model yet" in str(none.exception)
    assert not list(tmp_path.glob(".*"))


def test_the_configuration_of_the_test_is_one_of_lora_r_64(student: Student) -> None:
    from baton.pipelines.raft.config import Raft

    config = decode(Raft, student.plan.task("fit").config)
    assert (config.adapter.method, config.adapter.r, config.adapter.alpha) == ("lora", 64, 128)
