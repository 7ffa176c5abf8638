"""Three stages in a chain: what each starts from, kills anywhere, two processes, memory, export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages_lab import REPOSITORY, Task

from baton.errors import ConfigError
from baton.pipelines.clara.loader import load
from baton.pipelines.clara.training import build_loop
from baton.record import EvalRecord
from baton.stage import Outcome

HERE = Path(__file__).parent

WORKER = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from stages_lab import Task, signal_at
    from baton.handover import StopSignal
    from baton.stage import Outcome
    from baton.train.ranks import Ranks

    root = Path(sys.argv[2])

    def fork(work):
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        return child

    def ended(child):
        status = os.waitpid(child, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    """
)


def work(folder: Path, script: str) -> str:
    """Run a script in a process that has everything imported; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER + textwrap.dedent(script), str(HERE), str(folder)],
        env=os.environ | {"BATON_DEVICE": "cpu", "BATON_PEER_TIMEOUT": "60"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task that nothing happened to."""
    task = Task(tmp_path_factory.mktemp("finished") / "task")
    assert task.run() is Outcome.FINISHED
    return task


# --- the chain ----------------------------------------------------------------------------------


@pytest.mark.parametrize("init_decoder", ["fresh", "stage1"])
def test_each_stage_starts_from_the_one_before(tmp_path: Path, init_decoder: str) -> None:
    # The first step of a warm-up has a rate of 0: what is saved after it is what it began with.
    still = {"max_steps": 1, "warmup_steps": 1, "batch_samples": 8}
    task = Task(
        tmp_path / "task",
        stage2__train=still, stage3__train=still, stage2__init_decoder=init_decoder,
    )  # fmt: skip
    assert task.run("data", "stage1", "stage2", "stage3") is Outcome.FINISHED

    def weights(stage: str, role: str) -> dict[str, torch.Tensor]:
        return load_file(task.root / stage / "final" / role / "adapter_model.safetensors")

    def rows(stage: str) -> dict[str, torch.Tensor]:
        return load_file(task.root / stage / "final" / "memory.safetensors")

    def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        assert a.keys() == b.keys()
        return all(torch.equal(a[name], b[name]) for name in a)

    assert equal(weights("stage2", "encoder"), weights("stage1", "encoder"))
    assert equal(weights("stage2", "decoder"), weights("stage1", "decoder")) == (
        init_decoder == "stage1"
    )
    assert equal(weights("stage3", "encoder"), weights("stage2", "encoder"))
    assert equal(weights("stage3", "decoder"), weights("stage2", "decoder"))
    assert equal(weights("stage3", "query_reasoner"), weights("stage2", "encoder"))
    assert not equal(weights("stage3", "query_reasoner"), weights("stage3", "decoder"))
    assert equal(rows("stage1"), rows("stage2"))
    assert equal(rows("stage2"), rows("stage3"))
    fresh = [t for n, t in weights("stage2", "decoder").items() if "lora_B" in n]
    assert all(bool((t == 0).all()) for t in fresh) == (init_decoder == "fresh")


def test_what_learnt_in_a_stage_has_changed_by_its_end(finished: Task) -> None:
    def bytes_of(stage: str, file: str) -> bytes:
        return (finished.root / stage / "final" / file).read_bytes()

    weights = "adapter_model.safetensors"
    for file in (f"encoder/{weights}", f"decoder/{weights}", "memory.safetensors"):
        assert bytes_of("stage1", file) != bytes_of("stage2", file)
    assert bytes_of("stage3", f"encoder/{weights}") == bytes_of("stage2", f"encoder/{weights}")
    assert bytes_of("stage3", f"decoder/{weights}") != bytes_of("stage2", f"decoder/{weights}")
    assert bytes_of("stage3", f"query_reasoner/{weights}") != bytes_of(
        "stage2", f"encoder/{weights}"
    )
    assert bytes_of("stage3", "memory.safetensors") != bytes_of("stage2", "memory.safetensors")


def test_a_task_may_end_after_stage_2(tmp_path: Path) -> None:
    task = Task(tmp_path / "task", until="stage2")
    assert task.run() is Outcome.FINISHED
    assert not (task.root / "stage3" / "final").exists()
    record = EvalRecord.from_json((task.root / "eval" / "eval.json").read_bytes(), where="")
    columns = [score.column for score in record.scores]
    assert "f1" in columns
    assert "recall_at_k" not in columns, "nothing was chosen"
    model = load(task.root / "stage2" / "final")
    assert isinstance(model.answer("When?", ["Arden was founded in 1250."]), str)


# --- kills --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_or_preempted_in_every_stage_the_bytes_are_the_same(
    finished: Task, tmp_path: Path
) -> None:
    out = work(
        tmp_path,
        """
        moments = [("stage1", 1, "KILL"), ("stage1", 3, "TERM"), ("stage1", 5, "KILL"),
                   ("stage2", 1, "TERM"), ("stage2", 4, "KILL"), ("stage3", 1, "KILL"),
                   ("stage3", 4, "TERM"), ("eval", 2, "KILL"), ("eval", 3, "TERM")]
        task = Task(root / "task")
        for number, (stage, step, name) in enumerate(moments):
            sent = getattr(signal, f"SIG{name}")

            def leg():
                stop = StopSignal().install()
                task.legs = number
                outcome = task.run(stop=stop, on_progress=signal_at(stage, step, sent))
                os._exit(75 if outcome is Outcome.HANDED_OVER else 0)

            print(stage, step, name, ended(fork(leg)))
        task.legs = len(moments)
        print(task.run().value)
        """,
    )
    lines = out.split("\n")
    assert [line.split()[-1] for line in lines[:-1]] == [
        "-9", "75", "-9", "75", "-9", "-9", "75", "-9", "75", "finished"
    ]  # fmt: skip
    theirs, ours = finished.results(), Task(tmp_path / "task").results()
    assert theirs.keys() == ours.keys()
    assert len(theirs) > 30
    assert [name for name in theirs if theirs[name] != ours[name]] == []


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    work(
        tmp_path,
        """
        def train(name, world, rank):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ["BATON_RENDEZVOUS"] = f"file://{root}/{name}-rendezvous"
            task = Task(root / name, adapter__dropout=0.0, stage1__train__micro_batch=3)
            task.peers = ranks = Ranks.join()
            assert task.run() is Outcome.FINISHED
            ranks.leave()

        for name, world in (("alone", 1), ("pair", 2)):
            children = [fork(lambda: train(name, world, rank)) for rank in range(world)]
            assert [ended(child) for child in children] == [0] * world
        """,
    )
    alone, pair = Task(tmp_path / "alone"), Task(tmp_path / "pair")
    for stage in ("stage1", "stage2", "stage3"):
        curves = [
            [
                json.loads(line)
                for line in (t.root / stage / "metrics.jsonl").read_text().splitlines()
            ]
            for t in (alone, pair)
        ]
        assert len(curves[0]) == len(curves[1]) == 8
        for a, b in zip(*curves, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                # Sums in another order, which a choice of documents may amplify.
                tolerance = 5e-2 if stage == "stage3" else 1e-3
                assert a[key] == pytest.approx(b[key], rel=tolerance), (stage, key)
    answers = [
        [json.loads(line) for line in (t.root / "eval/predictions.jsonl").read_text().splitlines()]
        for t in (alone, pair)
    ]
    assert [a["row"] for a in answers[0]] == [a["row"] for a in answers[1]]


# --- memory -------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tmp_path: Path) -> None:
    small = Task(tmp_path / "small", stage1__train__micro_batch=2)
    large = Task(tmp_path / "large", stage1__train__micro_batch=8)
    small.run("data", "stage1")
    large.run("data")
    loop, _ = build_loop(large.leg(), "stage1")
    part, sizes = loop.part, []

    def short_of_memory(batch, whole):
        sizes.append(batch.samples)
        if batch.samples > 2:
            raise torch.OutOfMemoryError("no more")
        return part(batch, whole)

    loop.part = short_of_memory
    assert loop.run() is Outcome.FINISHED
    assert sizes[:3] == [8, 4, 2], "halved twice, in the first step"
    assert set(sizes[3:]) == {2}
    assert (large.root / "stage1" / "metrics.jsonl").read_bytes() == (
        small.root / "stage1" / "metrics.jsonl"
    ).read_bytes()
    [full] = {large.config.full_sample("stage1")}
    assert loop.state.tokens_per_micro_batch == 2 * full


def test_a_single_sample_that_does_not_fit_is_an_error_with_advice(tmp_path: Path) -> None:
    task = Task(tmp_path / "task", stage1__train__micro_batch=2)
    task.run("data")
    loop, _ = build_loop(task.leg(), "stage1")

    def never(batch, whole):
        raise torch.OutOfMemoryError("no more")

    loop.part = never
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        loop.run()


def test_activation_checkpointing_changes_no_bit(finished: Task, tmp_path: Path) -> None:
    task = Task(tmp_path / "task", **{
        f"stage{n}__train__activation_checkpointing": True for n in (1, 2, 3)
    })  # fmt: skip
    assert task.run() is Outcome.FINISHED
    ours, theirs = task.results(), finished.results()
    odd = [name for name in theirs if theirs[name] != ours[name]]
    assert odd == []


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_activation_checkpointing_is_really_on(tmp_path: Path, stage: str) -> None:
    task = Task(tmp_path / "task")
    task.run("data", *("stage1", "stage2")[: 0 if stage == "stage1" else 2])
    runs = []
    for asked in (False, True):
        trained = Task(tmp_path / f"{asked}", **{
            f"{stage}__train": {"max_steps": 1, "batch_samples": 8, "micro_batch": 8,
                                "activation_checkpointing": asked}
        })  # fmt: skip
        shutil.copytree(task.root, trained.root, dirs_exist_ok=True)
        loop, learner = build_loop(trained.leg(), stage)
        calls: list[bool] = []
        for layer in learner.network.base_model.layers:
            # Before it: once the last tensor is there, running again ends.
            layer.mlp.register_forward_pre_hook(
                lambda *_, to=calls: to.append(True) if torch.is_grad_enabled() else None
            )
        assert loop.run() is Outcome.FINISHED
        runs.append(len(calls))
    # Two layers, in two roles; asked for, each runs once more in the backward pass.
    assert runs == [4, 8]


def test_bfloat16_trains_through_all_stages_to_nearly_the_same_losses(
    finished: Task, tmp_path: Path
) -> None:
    task = Task(tmp_path / "task", **{f"stage{n}__train__precision": "bf16" for n in (1, 2, 3)})
    assert task.run() is Outcome.FINISHED

    def first_loss(of: Task, stage: str) -> float:
        line = (of.root / stage / "metrics.jsonl").read_text().splitlines()[0]
        return json.loads(line)["loss"]

    assert first_loss(task, "stage1") != first_loss(finished, "stage1")
    assert first_loss(task, "stage1") == pytest.approx(first_loss(finished, "stage1"), rel=0.02)


def test_a_preset_is_said_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="baton")
    task = Task(
        tmp_path / "task", stage1__train={"preset": "16gb", "max_steps": 1, "samples": 9}
    )  # fmt: skip
    task.run("data", "stage1")
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("preset")]
    assert line.endswith("name=16gb batch_samples=32 micro_batch=1 samples=9")
    auto = Task(tmp_path / "auto", stage1__train={"preset": "auto", "max_steps": 1})
    auto.run("data", "stage1")
    assert json.loads((auto.root / "stage1" / "preset.json").read_bytes()) == {"preset": "off"}


# --- eval and export ----------------------------------------------------------------------------


def test_the_record_has_scores_of_all_systems_and_what_was_chosen(finished: Task) -> None:
    record = EvalRecord.from_json((finished.root / "eval" / "eval.json").read_bytes(), where="")
    scores = {score.column: score for score in record.scores}
    assert {"f1", "f1_best", "f1_zh", "recall_at_k", "f1_text", "cover_em_no_document"} <= set(
        scores
    )
    rows = [
        json.loads(line)
        for line in (finished.root / "eval" / "predictions.jsonl").read_text().splitlines()
    ]
    assert {row["system"] for row in rows} == {"clara", "text", "no_document"}
    ours = [row for row in rows if row["system"] == "clara"]
    assert scores["recall_at_k"].n == len(ours)
    hits = [set(row["positives"]) <= set(row["chosen"]) for row in ours]
    assert scores["recall_at_k"].value == pytest.approx(sum(hits) / len(hits))
    assert all(len(row["chosen"]) == 2 for row in ours)
    steps = [step for step, _ in record.loss_curve]
    assert steps == [float(n) for n in range(1, 19)], "six steps of each stage, end to end"
    card = (finished.root / "stage3" / "final" / "README.md").read_text(encoding="utf-8")
    assert "RANDOM WEIGHTS" in card
    assert "from baton.pipelines.clara.loader import load" in card
    assert "| recall@2" in card


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_export_answers_in_a_fresh_process_as_the_task_did(
    finished: Task, tmp_path: Path, kind: str
) -> None:
    from baton.export import export
    from baton.store.local import LocalStore

    out = tmp_path / ("out.zip" if kind == "zip" else "out")
    export(LocalStore(finished.root), out, task="t", stages=("stage1", "stage2", "stage3"))
    rows = [
        json.loads(line)
        for line in (finished.root / "eval" / "predictions.jsonl").read_text().splitlines()
    ]
    asked = json.loads((finished.root / "data" / "test.jsonl").read_text().splitlines()[0])
    [row] = [r for r in rows if r["question"] == asked["question"] and r["system"] == "clara"]
    program = (
        "import json, sys; from baton.pipelines.clara.loader import load\n"
        "ask = json.loads(sys.argv[2]); model = load(sys.argv[1])\n"
        "print(json.dumps([model.answer(ask['question'], ask['documents'], max_new_tokens=6),"
        " model.retrieve(ask['question'], ask['documents']),"
        " list(model.compress(ask['documents']).shape)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(out), json.dumps(asked)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"BATON_DEVICE": "cpu", "PYTHONPATH": str(REPOSITORY / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer, chosen, shape = json.loads(done.stdout.splitlines()[-1])
    assert answer == row["prediction"]
    assert chosen == row["chosen"]
    assert shape == [len(asked["documents"]), 4, 32]


def test_a_repository_of_the_hub_holds_what_a_fresh_process_answers_with(
    finished: Task, tmp_path: Path
) -> None:
    from minihub import MiniHub

    asked = json.loads((finished.root / "data" / "test.jsonl").read_text().splitlines()[0])
    rows = (finished.root / "eval" / "predictions.jsonl").read_text().splitlines()
    [row] = [
        r for r in map(json.loads, rows)
        if r["question"] == asked["question"] and r["system"] == "clara"
    ]  # fmt: skip
    sends = (
        "import sys; from pathlib import Path; from baton.export import export_to_hub\n"
        "from baton.store.local import LocalStore\n"
        "store = LocalStore(Path(sys.argv[1])); stages = ('stage1', 'stage2', 'stage3')\n"
        "print(export_to_hub(store, 'hf://someone/clara/cr32', task='t', stages=stages))"
    )
    asks = (
        "import json, sys; from baton.pipelines.clara.loader import load\n"
        "ask = json.loads(sys.argv[1]); model = load('someone/clara', subfolder='cr32')\n"
        "print(json.dumps(model.answer(ask['question'], ask['documents'], max_new_tokens=6)))"
    )
    with MiniHub(tmp_path) as hub:
        environment = os.environ | dict(hub.environment) | {
            "BATON_DEVICE": "cpu", "PYTHONPATH": str(REPOSITORY / "src"),
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        said = []
        for words in ([sends, str(finished.root)], [asks, json.dumps(asked)]):
            done = subprocess.run(
                [sys.executable, "-c", *words],
                capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            said.append(done.stdout.splitlines()[-1])
    assert "clara.json" in said[0]
    assert json.loads(said[1]) == row["prediction"]
    [card] = (tmp_path / "home").rglob("cr32/README.md")
    assert 'load("someone/clara", subfolder="cr32")' in card.read_text(encoding="utf-8")


def test_answers_do_not_depend_on_what_else_is_asked_or_on_the_order_of_candidates(
    finished: Task,
) -> None:
    from baton.eval.config import GenerateConfig
    from baton.pipelines.clara.data import read_test
    from baton.pipelines.clara.responder import Asked

    responder = load(finished.root / "stage3" / "final").responder
    rows = read_test(finished.root)
    asks = [Asked(row.question, tuple(row.documents)) for row in rows]
    config = GenerateConfig(max_new_tokens=6)
    together, chosen = responder.answer(asks, config)
    for number, ask in enumerate(asks):
        alone, own = responder.answer([ask], config)
        assert alone.texts == [together.texts[number]]
        assert own == [chosen[number]]
        turned = Asked(ask.question, ask.documents[::-1])
        _, [other] = responder.answer([turned], config)
        last = len(ask.documents) - 1
        assert [last - i for i in other] == own[0]


def test_long_documents_are_cut_and_chosen_from(finished: Task) -> None:
    model = load(finished.root / "stage3" / "final")
    long = " ".join(f"Place number {n} lies on the river Wye." for n in range(80))
    assert len(model.responder.chunks(long)) > 3
    assert isinstance(model.answer("Where?", [long]), str)


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    from baton.errors import ModelError

    with pytest.raises(ModelError, match="no clara model is there"):
        load(tmp_path)
