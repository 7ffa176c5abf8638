"""The eval stage: the best checkpoint answers test questions, shard by shard, and is scored."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.config.decode import decode, encode
from baton.data.tokenise import ChatEncoder
from baton.errors import DamagedError
from baton.eval.generate import generate
from baton.eval.score import ScoreSheet, score_pairs
from baton.pipelines.medical_qa import data, training
from baton.pipelines.medical_qa.config import MedicalQA
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
from baton.train.base import describe, load_tokenizer
from baton.train.config import pin_key
from baton.train.environment import environment_of
from baton.train.metrics import FILE as METRICS
from baton.train.metrics import read_lines
from baton.train.ranks import Ranks

log = logging.getLogger(__name__)

FOLDER = "eval"


def evaluate(leg: Leg) -> Outcome:
    """Answer what is not answered yet, then score everything."""
    config: MedicalQA = leg.config
    ranks = Ranks.of(leg.peers)
    rows = chosen_rows(leg.folder, config)
    size = config.eval.generate.batch_size
    shards = [rows[i : i + size] for i in range(0, len(rows), size)]
    done = set(leg.store.names(f"{FOLDER}/shards"))
    missing = [i for i in range(len(shards)) if shard_name(i) not in done]
    mine = [i for i in missing if i % ranks.size == ranks.rank]
    best = _fetch_best(leg, ranks)
    if mine:
        _answer(leg, ranks, shards, mine, total=len(shards))
    if ranks.agree(leg.stop.is_set)[0]:
        return Outcome.HANDED_OVER
    if leg.is_first:
        _score(leg, ranks, rows, len(shards), best)
    shutil.rmtree(_best_folder(leg, ranks))
    return Outcome.FINISHED


def shard_name(number: int) -> str:
    return f"{FOLDER}/shards/{number:05d}.json"


def chosen_rows(folder: Path, config: MedicalQA) -> list[data.QARow]:
    """The test rows to answer: all, or a seeded draw; long questions together."""
    rows = data.read_test(folder)
    if config.eval.max_samples is not None and config.eval.max_samples < len(rows):
        rng = np.random.Generator(np.random.PCG64(config.eval.seed))
        rows = [rows[i] for i in rng.choice(len(rows), config.eval.max_samples, replace=False)]
    # Batches of like length pad little.
    return sorted(rows, key=lambda row: (-len(row.question), row.number))


def _fetch_best(leg: Leg, ranks: Ranks) -> int:
    """Bring the best checkpoint that is whole to `.best-RANK`; returns its step."""
    history = json.loads(leg.store.read(f"{training.FOLDER}/dev_history.json"))
    checkpoints = leg.checkpoints(f"{training.FOLDER}/checkpoints")
    dev_loss = {int(step): loss for step, loss in history}
    steps = sorted(checkpoints.everywhere(), key=lambda s: (dev_loss.get(s, float("inf")), -s))
    for step in steps:
        try:
            checkpoints.fetch_anywhere(step, _best_folder(leg, ranks))
            return step
        except DamagedError as error:
            log.warning("%s; the next best checkpoint is evaluated instead", error)
    raise DamagedError(
        f"{leg.task.name}: no checkpoint is whole; remove train/done.json from the task's folder"
        " and submit again to train anew"
    )


def _best_folder(leg: Leg, ranks: Ranks) -> Path:
    return leg.folder / f".best-{ranks.rank}"


def _answer(
    leg: Leg, ranks: Ranks, shards: list[list[data.QARow]], mine: list[int], *, total: int
) -> None:
    config: MedicalQA = leg.config
    learner = training.learner_for(leg, ranks.device, packed=False)
    learner.weights.load(_best_folder(leg, ranks))
    learner.model.eval()
    tokenizer = load_tokenizer(
        config.model,
        base_folder=leg.folder / data.BASE,
        revision=leg.plan.pins.get(pin_key(config.model), ""),
    )
    encoder = ChatEncoder(tokenizer, system=config.data.system, max_length=config.data.max_length)
    answered = total - len(mine)
    for number in mine:
        answers = generate(
            learner.model,
            tokenizer,
            [encoder.prompt_text(row.question) for row in shards[number]],
            config.eval.generate,
            ends=(encoder.end_of_turn,),
            seed=number,
            should_stop=lambda: leg.stop.is_set,
        )
        if answers is None:
            return
        peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else None
        shard = {
            "rows": [row.number for row in shards[number]],
            "predictions": answers.texts,
            "new_tokens": answers.new_tokens,
            "measured": {"seconds": answers.seconds, "peak_gpu_memory_bytes": peak},
        }
        leg.check_fence()
        leg.store.write(shard_name(number), dump_json(shard))
        answered += 1
        leg.report(step=answered, total=total, unit="shards")
        leg.log("answered", shard=f"{answered}/{total}", seconds=answers.seconds)


def _score(leg: Leg, ranks: Ranks, rows: list[data.QARow], shards: int, best_step: int) -> None:
    config: MedicalQA = leg.config
    answered = [json.loads(leg.store.read(shard_name(i))) for i in range(shards)]
    predictions = [text for shard in answered for text in shard["predictions"]]
    numbers = [number for shard in answered for number in shard["rows"]]
    if numbers != [row.number for row in rows]:
        raise DamagedError(
            f"{leg.task.name}: the shards below {FOLDER}/shards are of other test rows;"
            " remove that folder and submit again"
        )
    sheet = score_pairs(
        predictions,
        [row.answer for row in rows],
        seed=config.eval.seed,
        resamples=config.eval.bootstrap_resamples,
    )
    _write_predictions(leg, rows, predictions, sheet)
    figures = json.loads(leg.store.read(training.SUMMARY))
    report = data.read_report(leg)
    curve = read_lines(leg.folder / training.FOLDER / METRICS)
    record = EvalRecord(
        notice=leg.notice,
        experiment=leg.plan.experiment,
        digest=leg.plan.digest,
        task=leg.task.name,
        pipeline=leg.plan.pipeline,
        labels=leg.task.labels,
        model=describe(config.model, leg.plan.pins.get(pin_key(config.model), "")),
        data={"rows": report["rows"], "tokens": report["tokens"]["train"]},
        scores=[decode(ScoreEntry, encode(score)) for score in sheet.scores],
        training=decode(
            TrainingFigures,
            figures | {"best_step": best_step, "adapter_bytes": _adapter_bytes(leg, ranks)},
        ),
        generation=_figures(config, answered),
        loss_curve=[[line["step"], line["loss"]] for line in curve if "loss" in line],
        dev_curve=[[line["step"], line["dev_loss"]] for line in curve if "dev_loss" in line],
        samples=[
            Sample(prompt=row.question, reference=row.answer, prediction=prediction)
            for row, prediction in sorted(
                zip(rows, predictions, strict=True), key=lambda pair: pair[0].number
            )[: config.eval.report_samples]
        ],
        config=leg.task.config,
        environment=environment_of(ranks),
    )
    leg.store.write(f"{FOLDER}/eval.json", record.to_json())
    leg.log("scored", **{score.column: round(score.value, 4) for score in sheet.scores})


def _write_predictions(
    leg: Leg, rows: list[data.QARow], predictions: list[str], sheet: ScoreSheet
) -> None:
    lines = [
        {"row": r.number, "question": r.question, "reference": r.answer, "prediction": prediction}
        for r, prediction in zip(rows, predictions, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    leg.store.write(f"{FOLDER}/predictions.jsonl", text.encode())
    per_sample = PerSample(
        notice=leg.notice,
        rows=[row.number for row in rows],
        scores={column: values.tolist() for column, values in sheet.per_sample.items()},
        bleu_statistics=sheet.bleu_statistics.tolist(),
    )
    leg.store.write(f"{FOLDER}/per_sample.json", per_sample.to_json())


def _adapter_bytes(leg: Leg, ranks: Ranks) -> int | None:
    folder = _best_folder(leg, ranks) / "adapter"
    if not folder.exists():
        return None
    return sum(path.stat().st_size for path in folder.iterdir())


def _figures(config: MedicalQA, answered: list[dict[str, Any]]) -> GenerationFigures:
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
