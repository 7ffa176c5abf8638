"""Data, validation and teaching as stages: strict, exact, resumable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from baton.cli import cli
from baton.config.decode import decode
from baton.data.tokenise import ChatEncoder, TokenFile
from baton.errors import BatonError, ConfigError, DataError, TeacherError
from baton.handover import StopSignal
from baton.pipelines.questions_gen.config import GrpoConfig, QuestionsGen
from baton.pipelines.questions_gen.problem import Problem
from baton.pipelines.questions_gen.prompts import KINDS, Request
from baton.plan import build_plan, select
from baton.runner import TaskRunner, task_store
from baton.tuning.model import TaskModel

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HOME", str(REPOSITORY))
    monkeypatch.setenv("BATON_DEVICE", "cpu")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Runs one task up to a stage; returns its folder."""

    def go(*settings: str, until: str = "data") -> Path:
        words = ["matrix.reward=null", *settings]
        plan = build_plan(select("smoke/questions_gen", words).experiment, created="now")
        [task] = plan.tasks
        store = task_store(tmp_path, plan, task.name)
        TaskRunner(
            plan=plan, task=task, store=store, stop=StopSignal(), submission="test", until=until
        ).run()
        return store.root

    return go


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, count: int, **extra: str) -> Path:
    rows = [
        {"problem": f"Determine the integer {i} + 1.", "solution": f"It is\n#### {i + 1}", **extra}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- strict mode ----------------------------------------------------------------------------


def nothing_was_made(folder: Path) -> bool:
    return not any(folder.rglob("*.tokens"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no rows|empty"),
        ('{"problem": "What is 2 + 2?", "solution": "It is 4."}\n' * 9, "competition score above"),
        ('{"question": "What is 2 + 2?"}\n', "no column 'problem'"),
    ],
)
def test_no_usable_problem_is_an_error_and_nothing_is_simulated(
    text: str, words: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        run(f"data.path={path}")
    assert caught.value.exit_status == 78
    assert nothing_was_made(tmp_path)


def test_a_missing_file_is_an_error(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises((DataError, ConfigError)) as caught:
        run(f"data.path={tmp_path / 'nowhere.jsonl'}")
    assert caught.value.exit_status == 78


def test_a_hub_out_of_reach_is_an_error(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Offline is what the Hub's own client calls it; the cache is empty.
    code = (
        "import sys; from baton.cli import main; "
        "sys.argv = ['baton', 'submit', 'questions_gen', '--store', sys.argv[1]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs")],
        env=os.environ
        | {
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 78, done.stderr
    assert "could not be fetched" in done.stderr
    assert nothing_was_made(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["sympy", "jinja2"])
def test_a_missing_dependency_is_an_error(package: str, tmp_path: Path) -> None:
    planned = subprocess.run(
        [sys.executable, "-m", "baton", "plan", "smoke/questions_gen", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    path = tmp_path / "plan.json"
    path.write_text(planned.stdout)
    words = ["baton", "run", str(path), "--task", "keyword", "--store", str(tmp_path / "runs")]
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = {words!r};"
        " from baton.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode in (1, 78), done.stderr
    assert package in done.stderr
    assert nothing_was_made(tmp_path)


# --- data -----------------------------------------------------------------------------------


def test_kept_rows_become_prompts_and_targets(run: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 20)
    with path.open("a") as file:
        file.write('{"problem": "What is 2 + 2?", "solution": "It is four."}\n')
        file.write('{"problem": "", "solution": "nothing"}\n')
    folder = run(f"data.path={path}")
    report = json.loads((folder / "data" / "report.json").read_bytes())
    assert report["census"]["read"] == 21
    assert report["census"]["competition"] == report["census"]["with_answer"] == 20
    assert report["rejects"] == {"empty_problem": 1}
    assert report["rows"] == {"pool": 20, "chat": 0, "train": 16, "dev": 2, "test": 2}
    kept = [
        row for part in ("train", "dev", "test") for row in rows_of(folder / f"data/{part}.jsonl")
    ]
    assert sorted(row["number"] for row in kept) == list(range(1, 21))
    plan = build_plan(select("smoke/questions_gen").experiment, created="now")
    config = decode(QuestionsGen, plan.tasks[0].config)
    tokenizer = TaskModel(config=config.view(config.sft), folder=folder, pins={}).tokenizer()
    tokens, prompt = TokenFile(folder / "data", "train").sample(0)
    row = rows_of(folder / "data" / "train.jsonl")[0]
    request = Request(row["topics"][0], row["difficulty"])
    encoder = ChatEncoder(tokenizer, system=None, max_length=224)
    assert tokenizer.decode(tokens[:prompt]) == encoder.prompt_text(request.text())
    target = Problem(row["problem"], row["answer"], "It is")
    assert tokenizer.decode(tokens[prompt:], skip_special_tokens=True) == target.text()


def test_a_quarter_of_the_mix_is_chat(run: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 40)
    chat = tmp_path / "chat.jsonl"
    turns = [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Good day"}]
    odd = [{"from": "gpt", "value": "I begin"}, {"from": "human", "value": "You do"}]
    roles = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Good day"},
    ]
    lines = [{"conversations": one} for one in [turns] * 9 + [roles] * 9 + [odd]]
    chat.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = run(f"data.path={path}", f"data.chat={{path: {chat}, share: 0.25}}")
    report = json.loads((folder / "data" / "report.json").read_bytes())
    assert (report["rows"]["train"], report["rows"]["chat"]) == (32, 11)
    assert report["tokens"]["train"]["samples"] == 43
    with pytest.raises(DataError, match="there are 18"):
        run(f"data.path={path}", f"data.chat={{path: {chat}, share: 0.5}}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"turns": []}, "chat.jsonl:1: an object with 'conversations' is needed"),
        ({"conversations": "hello"}, "a list of turns is needed, got str"),
        ({"conversations": ["hello"]}, "a turn must be an object, got str"),
        ({"conversations": []}, "no conversation of .* can be used"),
    ],
)
def test_a_bad_chat_file_is_named(
    line: dict[str, Any], words: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    path, chat = write_rows(tmp_path / "rows.jsonl", 20), tmp_path / "chat.jsonl"
    chat.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=words):
        run(f"data.path={path}", f"data.chat={{path: {chat}}}")


def test_the_command_prints_what_the_filter_makes_of_a_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 5)
    done = CliRunner().invoke(
        cli, ["data", "questions", "judge", str(path), "--out", str(tmp_path / "kept.jsonl")]
    )
    assert done.exit_code == 0, done.output
    assert "5 of 5 rows are competition problems (100.0%)" in done.output
    assert "difficulty: basic 5" in done.output
    assert len(rows_of(tmp_path / "kept.jsonl")) == 5
    path.write_text('{"problem": "What is 2 + 2?", "solution": "It is 4."}\n')
    done = CliRunner().invoke(cli, ["data", "questions", "judge", str(path)])
    assert isinstance(done.exception, BatonError)
    assert done.exception.exit_status == 78


# --- validation and configuration -----------------------------------------------------------


def test_a_collapse_ends_training_with_a_clear_message(run: Callable[..., Path]) -> None:
    with pytest.raises(BatonError, match="grpo: the quality of validation problems fell") as caught:
        run(
            "sft.max_steps=30",
            "sft.eval_every_steps=30",
            # Noise instead of learning, at a rate that ruins the model at once.
            "grpo.reward={keyword: 1.0, independent: 0.0}",
            "grpo.learning_rate=0.3",
            "grpo.warmup_steps=0",
            "grpo.max_steps=4",
            "grpo.eval_every_steps=2",
            "validation.collapse=0.5",
            until="grpo",
        )
    assert caught.value.exit_status == 78
    assert "Lower grpo.learning_rate or raise grpo.beta" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("grpo.batch_samples=5", "batch_samples must divide the 64 completions"),
        ("grpo.max_steps=null", "max_steps must be given"),
        ("grpo.reward={keyword: 0, independent: 0, checked: 0}", "must be more than 0"),
        ("grpo.sampling.repetition_penalty=1.1", "would change the policy"),
        ("grpo.group=1", "at least 2"),
        ("distill.teacher={source: none}", "source"),
        ("distill.teacher={source: openai, url: localhost, model: m}", "http:// or https://"),
        ("data.columns={question: q}", "columns must map problem and solution"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, words: str) -> None:
    settings = ["matrix.reward=null", setting]
    with pytest.raises(ConfigError, match=words):
        build_plan(select("smoke/questions_gen", settings).experiment, created="now")


def test_the_defaults_are_those_of_the_guide() -> None:
    plan = build_plan(select("questions_gen").experiment, created="now")
    config = decode(QuestionsGen, plan.tasks[0].config)
    assert (config.sft.max_steps, config.grpo.max_steps, config.distill.max_steps) == (200, 100, 80)
    assert (config.sft.batch_samples, config.sft.learning_rate, config.sft.warmup_steps) == (
        8,
        1e-4,
        10,
    )
    assert (config.distill.batch_samples, config.distill.learning_rate) == (4, 1e-5)
    grpo = GrpoConfig()
    assert (grpo.group, grpo.clip, grpo.max_new_tokens) == (8, 0.2, 256)
    assert (grpo.sampling.temperature, grpo.sampling.top_p, grpo.sampling.top_k) == (0.7, 0.8, 20)
    assert (config.adapter.r, config.adapter.alpha, config.adapter.dropout) == (32, 32, 0.0)
    assert config.sft.seed == config.grpo.seed == config.distill.seed == config.data.seed == 3407
    assert config.data.max_length == 2048
    assert config.data.min_competition_score == 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_variation_shows_its_problem_and_asks_for_a_new_answer(kind: Any) -> None:
    source = Problem("Compute 1 + 1.", "2", "It is 2.")
    text = Request("", "", kind, source).text()
    assert source.text() in text
    assert "Vary this competition problem." in text
    if kind != "context":
        assert "answer" in text.partition("\n")[0]


# --- the teacher ----------------------------------------------------------------------------


def test_a_teacher_that_dies_is_gone_on_with_and_paid_once(
    run: Callable[..., Path], service: Any, tmp_path: Path
) -> None:
    teacher = service.Teacher(service.competition, dies_after=15)
    with service.Server(teacher) as server:
        asked = {"source": "openai", "url": server.url, "model": "rule", "attempts": 2}
        settings = (
            "sft.max_steps=20",
            "sft.eval_every_steps=20",
            "grpo.max_steps=1",
            "distill.problems=10",
            "distill.variations=1",
            f"distill.teacher={json.dumps(asked | {'price_in': 1.0, 'price_out': 2.0})}",
        )
        with pytest.raises(TeacherError, match="is kept") as caught:
            run(*settings, until="teach")
        assert caught.value.exit_status == 1
        assert sum(teacher.answered.values()) == 15
        teacher.dies_after = None
        folder = run(*settings, until="teach")
        assert set(teacher.answered.values()) == {1}
        assert len(teacher.answered) == 10 * 3
    report = json.loads((folder / "distill" / "taught" / "report.json").read_bytes())
    assert (report["teacher"], report["proposals"], report["improved"]) == ("openai", 10, 10)
    assert report["variations"] == 10
    assert report["tokens"]["samples"] == 20
    assert report["cost"] == pytest.approx(
        (report["prompt_tokens"] + 2 * report["completion_tokens"]) / 1e6
    )
    assert report["cost"] > 0
    assert len(list((folder / "teach" / "replies").rglob("*.json"))) == 30
