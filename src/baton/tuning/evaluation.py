"""The eval stage: the best checkpoint answers questions, shard by shard, and is scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from baton.config.decode import decode, encode
from baton.errors import DamagedError
from baton.eval.generate import Answers
from baton.eval.score import ScoreSheet
from baton.generation.answer import answer_batches
from baton.record import (
    EvalRecord,
    GenerationFigures,
    PerSample,
    Sample,
    ScoreEntry,
    TrainingFigures,
    dump_json,
)
from baton.stage import Leg, Outcome
from baton.train.adapters import FOLDER as ADAPTER
from baton.train.environment import environment_of
from baton.train.metrics import FILE as METRICS
from baton.train.metrics import read_lines
from baton.train.ranks import Ranks
from baton.tuning.best import TRAIN, fetch_best
from baton.tuning.model import Model, TaskModel, Tuning
from baton.tuning.training import SUMMARY, read_report

FOLDER = "eval"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt to answer.

    `number` names it in every task of an experiment; `prompt` is rendered up to where the answer
    begins, or what else the exam's `answer` takes; `asked` is what people read; `notes` stand
    beside the answer in predictions.jsonl.
    """

    number: int
    prompt: Any
    asked: str
    reference: str
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """All questions, in the order in which they are answered, and how answers are scored.

    Attributes:
        ends: tokens that end an answer besides the model's own.
        score: from the answers, in the order of the questions.
        model: who answers; the task's chat model unless given.
        answer: how it answers a batch of prompts, where that is not as any chat model does; see
            `generate`.
        stage: the one whose best checkpoint answers.
        before: stages that trained before it; curves show them end to end.
    """

    questions: Sequence[Question]
    ends: Sequence[int]
    score: Callable[[Sequence[str]], ScoreSheet]
    model: Model | None = None
    answer: Callable[..., Answers | None] | None = None
    stage: str = TRAIN
    before: Sequence[str] = ()


def hold(leg: Leg, exam: Exam) -> Outcome:
    """Answer what is not answered yet, then score everything."""
    config: Tuning = leg.config
    ranks = Ranks.of(leg.peers)
    size = config.eval.generate.batch_size
    questions = exam.questions
    shards = [questions[i : i + size] for i in range(0, len(questions), size)]
    done = set(leg.store.names(f"{FOLDER}/shards"))
    missing = [i for i in range(len(shards)) if shard_name(i) not in done]
    mine = [i for i in missing if i % ranks.size == ranks.rank]
    best = _fetch_best(leg, ranks, exam.stage)
    if mine:
        _answer(leg, ranks, exam, shards, mine)
    if ranks.agree(leg.stop.is_set)[0]:
        return Outcome.HANDED_OVER
    if leg.is_first:
        _score(leg, ranks, exam, len(shards), best)
    shutil.rmtree(_best_folder(leg, ranks))
    return Outcome.FINISHED


def shard_name(number: int) -> str:
    return f"{FOLDER}/shards/{number:05d}.json"


def _fetch_best(leg: Leg, ranks: Ranks, stage: str) -> int:
    """Bring the best checkpoint that is whole to `.best-RANK`; returns its step."""
    checkpoints = leg.checkpoints(f"{stage}/checkpoints")
    target = _best_folder(leg, ranks)
    return fetch_best(checkpoints, leg.store, target, task=leg.task.name, stage=stage)


def _best_folder(leg: Leg, ranks: Ranks) -> Path:
    return leg.folder / f".best-{ranks.rank}"


def _answer(
    leg: Leg, ranks: Ranks, exam: Exam, shards: Sequence[Sequence[Question]], mine: list[int]
) -> None:
    config: Tuning = leg.config
    model = exam.model or TaskModel.of(leg)
    learner = model.learner(ranks.device, packed=False)
    learner.weights.load(_best_folder(leg, ranks))
    learner.model.eval()
    tokenizer = model.tokenizer()
    total = len(shards)
    answered = total - len(mine)
    batches = answer_batches(
        learner.model,
        tokenizer,
        {number: [question.prompt for question in shards[number]] for number in mine},
        config.eval.generate,
        ends=exam.ends,
        exact=config.train.deterministic,
        should_stop=lambda: leg.stop.is_set,
        answer=exam.answer,
    )
    for number, answers in batches:
        peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else None
        shard = {
            "rows": [question.number for question in shards[number]],
            "predictions": answers.texts,
            "new_tokens": answers.new_tokens,
            **({"notes": list(answers.notes)} if answers.notes else {}),
            "measured": {"seconds": answers.seconds, "peak_gpu_memory_bytes": peak},
        }
        leg.check_fence()
        leg.store.write(shard_name(number), dump_json(shard))
        answered += 1
        leg.report(step=answered, total=total, unit="shards")
        leg.log("answered", shard=f"{answered}/{total}", seconds=answers.seconds)


def _score(leg: Leg, ranks: Ranks, exam: Exam, shards: int, best_step: int) -> None:
    config: Tuning = leg.config
    questions = exam.questions
    answered = [json.loads(leg.store.read(shard_name(i))) for i in range(shards)]
    predictions = [text for shard in answered for text in shard["predictions"]]
    numbers = [number for shard in answered for number in shard["rows"]]
    if numbers != [question.number for question in questions]:
        raise DamagedError(
            f"{leg.task.name}: the shards below {FOLDER}/shards are of other test rows;"
            " remove that folder and submit again"
        )
    notes = [note for s in answered for note in s.get("notes") or [{}] * len(s["rows"])]
    sheet = exam.score(predictions)
    _write_predictions(leg, questions, predictions, notes, sheet)
    figures = json.loads(leg.store.read(f"{exam.stage}/{SUMMARY}"))
    report = read_report(leg)
    curve = _curve(leg, exam)
    record = EvalRecord(
        notice=leg.notice,
        experiment=leg.plan.experiment,
        digest=leg.plan.digest,
        task=leg.task.name,
        pipeline=leg.plan.pipeline,
        labels=leg.task.labels,
        model=(exam.model or TaskModel.of(leg)).description(),
        data={"rows": report["rows"], "tokens": report["tokens"]["train"]},
        scores=[decode(ScoreEntry, encode(score)) for score in sheet.scores],
        training=decode(
            TrainingFigures,
            figures | {"best_step": best_step, "adapter_bytes": _adapter_bytes(leg, ranks)},
        ),
        generation=_figures(config, answered),
        loss_curve=[[line["step"], line["loss"]] for line in curve if "loss" in line],
        dev_curve=[[line["step"], line["dev_loss"]] for line in curve if "dev_loss" in line],
        dev_scores={
            name: [[line["step"], line[name]] for line in curve if name in line]
            for name in sorted({key for line in curve for key in line if key.startswith("dev_")})
            if name != "dev_loss"
        },
        samples=[
            Sample(prompt=question.asked, reference=question.reference, prediction=prediction)
            for question, prediction in sorted(
                zip(questions, predictions, strict=True), key=lambda pair: pair[0].number
            )[: config.eval.report_samples]
        ],
        config=leg.task.config,
        environment=environment_of(ranks),
    )
    leg.store.write(f"{FOLDER}/eval.json", record.to_json())
    leg.log("scored", **{score.column: round(score.value, 4) for score in sheet.scores})


def _curve(leg: Leg, exam: Exam) -> list[dict[str, Any]]:
    """The logged lines of every stage that trained, their steps counted on."""
    lines: list[dict[str, Any]] = []
    for stage in (*exam.before, exam.stage):
        first = lines[-1]["step"] if lines else 0
        own = read_lines(leg.folder / stage / METRICS)
        lines += [{**line, "step": first + line["step"]} for line in own]
    return lines


def _write_predictions(
    leg: Leg,
    questions: Sequence[Question],
    predictions: list[str],
    notes: Sequence[Mapping[str, Any]],
    sheet: ScoreSheet,
) -> None:
    lines = [
        {
            "row": q.number,
            "question": q.asked,
            "reference": q.reference,
            "prediction": prediction,
            **q.notes,
            **note,
        }
        for q, prediction, note in zip(questions, predictions, notes, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    leg.store.write(f"{FOLDER}/predictions.jsonl", text.encode())
    per_sample = PerSample(
        notice=leg.notice,
        rows=[question.number for question in questions],
        scores={column: values.tolist() for column, values in sheet.per_sample.items()},
        bleu_statistics=sheet.bleu_statistics.tolist(),
    )
    leg.store.write(f"{FOLDER}/per_sample.json", per_sample.to_json())


def _adapter_bytes(leg: Leg, ranks: Ranks) -> int | None:
    folder = _best_folder(leg, ranks) / ADAPTER
    if not folder.exists():
        return None
    return sum(path.stat().st_size for path in folder.iterdir())


def _figures(config: Tuning, answered: list[dict[str, Any]]) -> GenerationFigures:
    seconds = sum(shard["measured"]["seconds"] for shard in answered)
    samples = sum(len(shard["rows"]) for shard in answered)
    tokens = sum(sum(shard["new_tokens"]) for shard in answered)
    peaks = [shard["measured"]["peak_gpu_memory_bytes"] for shard in answered]
    return GenerationFigures(
        seconds=round(seconds, 3),
        samples=samples,
        new_tokens=tokens,
        samples_per_s=round(samples / seconds, 3),
        new_tokens_per_s=round(tokens / seconds, 1),
        decoding=config.eval.generate.describe(),
        max_new_tokens=config.eval.generate.max_new_tokens,
        batch_size=config.eval.generate.batch_size,
        peak_gpu_memory_bytes=None if None in peaks else max(peaks, default=None),
    )
