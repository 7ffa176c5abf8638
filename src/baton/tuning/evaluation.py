"""The eval stage: the best checkpoint answers questions, shard by shard, and is scored."""

from __future__ import annotations

import itertools
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
from baton.train.adapters import WEIGHTS
from baton.train.environment import environment_of
from baton.train.learner import Learner
from baton.train.metrics import FILE as METRICS
from baton.train.metrics import read_lines
from baton.train.ranks import Ranks
from baton.train.shard_files import sharded_bytes
from baton.tuning.best import TRAIN, fetch_best
from baton.tuning.model import Model, TaskModel, Tuning
from baton.tuning.training import SUMMARY, read_report

FOLDER = "eval"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt to answer.

    `number` names it in every task of an experiment; `prompt` is rendered up to where the answer
    begins, or what else the exam's `answer` takes; `asked` is what people read; `notes` stand
    beside the answer in predictions.jsonl. `stage` is the training stage that answers, where it
    is another than the exam's.
    """

    number: int
    prompt: Any
    asked: str
    reference: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """All questions, in the order in which they are answered, and how answers are scored.

    Where several training stages answer, the questions of each stand together, and they are the
    same ones in the same order.

    Attributes:
        ends: tokens that end an answer besides the model's own.
        score: from the answers, in the order of the questions.
        model: who answers; the task's chat model unless given.
        answer: how it answers a batch of prompts, where that is not as any chat model does; see
            `generate`.
        exact: an answer must not depend by a rounding error on those that are written beside it.
        stage: the one whose best checkpoint answers.
        before: stages that trained before it; curves and figures count them in.
        curves: figures of logged steps that reports show beside the loss.
    """

    questions: Sequence[Question]
    ends: Sequence[int]
    score: Callable[[Sequence[str]], ScoreSheet]
    model: Model | None = None
    answer: Callable[..., Answers | None] | None = None
    exact: bool = False
    stage: str = TRAIN
    before: Sequence[str] = ()
    curves: Sequence[str] = ()

    def stage_of(self, question: Question) -> str:
        """The training stage whose best checkpoint answers a question."""
        return question.stage or self.stage

    @property
    def stages(self) -> list[str]:
        """The training stages whose models answer, in their order."""
        return list(dict.fromkeys(map(self.stage_of, self.questions))) or [self.stage]

    def shards(self, size: int) -> list[Sequence[Question]]:
        """Batches of at most `size` questions, all of one stage."""
        whole = [list(group) for _, group in itertools.groupby(self.questions, self.stage_of)]
        return [group[i : i + size] for group in whole for i in range(0, len(group), size)]


def hold(leg: Leg, exam: Exam) -> Outcome:
    """Answer what is not answered yet, then score everything."""
    config: Tuning = leg.config
    ranks = Ranks.of(leg.peers)
    shards = exam.shards(config.eval.generate.batch_size)
    done = set(leg.store.names(f"{FOLDER}/shards"))
    missing = [i for i in range(len(shards)) if shard_name(i) not in done]
    mine = [i for i in missing if i % ranks.size == ranks.rank]
    learner: Learner | None = None
    for stage in exam.stages:
        best = _fetch_best(leg, ranks, stage)
        theirs = [i for i in mine if exam.stage_of(shards[i][0]) == stage]
        if theirs:
            learner = learner or _load(leg, ranks, exam)
            learner.weights.load(_best_folder(leg, ranks))
            _answer(leg, ranks, exam, learner, shards, theirs)
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
    folder, name = _best_folder(leg, ranks), leg.task.name
    checkpoints = leg.checkpoints(f"{stage}/checkpoints")
    return fetch_best(checkpoints, leg.store, folder, task=name, stage=stage)


def _load(leg: Leg, ranks: Ranks, exam: Exam) -> Learner:
    model = exam.model or TaskModel.of(leg)
    learner = model.learner(ranks.device, packed=False)
    learner.model.eval()
    return learner


def _best_folder(leg: Leg, ranks: Ranks) -> Path:
    return leg.folder / f".best-{ranks.rank}"


def _answer(
    leg: Leg,
    ranks: Ranks,
    exam: Exam,
    learner: Learner,
    shards: Sequence[Sequence[Question]],
    mine: list[int],
) -> None:
    config: Tuning = leg.config
    model = exam.model or TaskModel.of(leg)
    tokenizer = model.tokenizer()
    total = len(shards)
    answered = len(set(leg.store.names(f"{FOLDER}/shards")) & set(map(shard_name, range(total))))
    stages = [exam.stage_of(shard[0]) for shard in shards]
    # Counted from the stage's first shard: each stage's model draws in the same way.
    first = stages.index(stages[mine[0]])
    batches = answer_batches(
        learner.model,
        tokenizer,
        {i - first: [question.prompt for question in shards[i]] for i in mine},
        config.eval.generate,
        ends=exam.ends,
        exact=exam.exact,
        should_stop=lambda: leg.stop.is_set,
        answer=exam.answer,
        scratch=leg.folder / f".vllm-{ranks.rank}",
    )
    for place, answers in batches:
        number = first + place
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
    report = read_report(leg)
    curve = _curve(leg, (*exam.before, *exam.stages))
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
            _training(leg, (*exam.before, *exam.stages), best_step)
            | {"adapter_bytes": _adapter_bytes(leg, ranks)},
        ),
        generation=_figures(config, answered),
        loss_curve=[[line["step"], line["loss"]] for line in curve if "loss" in line],
        dev_curve=[[line["step"], line["dev_loss"]] for line in curve if "dev_loss" in line],
        dev_scores={
            name: [[line["step"], line[name]] for line in curve if name in line]
            for name in sorted({key for line in curve for key in line})
            if (name.startswith("dev_") and name != "dev_loss") or name in exam.curves
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
        rows=list(dict.fromkeys(question.number for question in questions)),
        scores={column: values.tolist() for column, values in sheet.per_sample.items()},
        bleu_statistics=sheet.bleu_statistics.tolist(),
    )
    leg.store.write(f"{FOLDER}/per_sample.json", per_sample.to_json())


def _training(leg: Leg, stages: Sequence[str], best_step: int) -> dict[str, Any]:
    """What the training stages took together; their steps are counted on."""
    every = [json.loads(leg.store.read(f"{stage}/{SUMMARY}")) for stage in stages]
    counts = ("seconds", "steps", "samples", "tokens", "labelled_tokens")
    total = {name: sum(figures[name] for figures in every) for name in counts}
    peaks = [figures["peak_gpu_memory_bytes"] for figures in every]
    return {
        **every[-1],
        **total,
        "started": every[0]["started"],
        "best_step": total["steps"] - every[-1]["steps"] + best_step,
        "samples_per_s": round(total["samples"] / total["seconds"], 3),
        "tokens_per_s": round(total["tokens"] / total["seconds"], 1),
        "peak_gpu_memory_bytes": None if None in peaks else max(peaks),
    }


def _curve(leg: Leg, stages: Sequence[str]) -> list[dict[str, Any]]:
    """The logged lines of the training stages, their steps counted on."""
    lines, before = [], 0
    for stage in stages:
        own = read_lines(leg.folder / stage / METRICS)
        lines += [{**line, "step": line["step"] + before} for line in own]
        before += json.loads(leg.store.read(f"{stage}/{SUMMARY}"))["steps"]
    return lines


def _adapter_bytes(leg: Leg, ranks: Ranks) -> int | None:
    folder = _best_folder(leg, ranks) / ADAPTER
    if not folder.exists():
        return None
    size = sum(path.stat().st_size for path in folder.iterdir())
    return size + sharded_bytes(folder.parent, f"{ADAPTER}/{WEIGHTS}")


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
