"""Train and eval stages of t5_pretrain on a few rows: curves, BLEU, what is left behind."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from baton.eval.answer import Ask, Trained
from baton.eval.bleu import char_statistics, corpus_bleu
from baton.eval.config import GenerateConfig
from baton.eval.generate import generate_responses
from baton.pipelines.t5_pretrain import dev_bleu
from baton.pipelines.t5_pretrain.answer import T5Answerer
from baton.pipelines.t5_pretrain.evaluate import evaluate
from baton.record import EvalRecord
from baton.stage import Outcome
from baton.train.metrics import read_lines

MODEL = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 1,
    "num_decoder_layers": 1,
}
TRAIN = {
    "batch_size": 4,
    "accumulation": 2,
    "gpus": 1,
    "max_steps": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "log_every_steps": 1,
    "eval_every_steps": 8,
    "save_every_steps": 8,
    "save_every_minutes": None,
}
SECTIONS: dict[str, Any] = {
    "data": {"rows": 64, "valid_rows": 10, "valid_share": 0.3},
    "model": MODEL,
    "train": TRAIN,
    "dev_score": {"samples": 5, "batch_size": 2, "max_new_tokens": 8},
    "eval": {"generate": {"max_new_tokens": 8, "batch_size": 4}, "bootstrap_resamples": 100},
}


def curve(task: Any) -> list[dict[str, Any]]:
    return read_lines(task.root / "train" / "metrics.jsonl")


def test_low_memory_has_the_same_curve_to_the_last_bit(
    many: Path, task: Callable[..., Any]
) -> None:
    curves = []
    for low_memory in (False, True):
        one = task(many, **(SECTIONS | {"train": TRAIN | {"low_memory": low_memory}}))
        one.prepare()
        assert one.train() is Outcome.FINISHED
        curves.append(curve(one))
    assert curves[0] == curves[1]
    assert sum("dev_bleu" in line for line in curves[0]) == 2


@pytest.fixture
def trained(many: Path, task: Callable[..., Any]) -> Any:
    one = task(many, **SECTIONS)
    one.prepare()
    assert one.train() is Outcome.FINISHED
    return one


def test_the_best_model_loads_in_transformers_and_answers_on_the_command_line(
    trained: Any,
) -> None:
    leg = trained.leg()
    assert evaluate(leg) is Outcome.FINISHED
    path = trained.root / "eval" / "eval.json"
    record = EvalRecord.from_json(path.read_bytes(), where="eval")
    scores = {score.column: score for score in record.scores}
    assert scores["bleu_4_char"].n == 10
    assert "tok:char" in scores["bleu_4_char"].convention
    history = json.loads((trained.root / "train" / "dev_history.json").read_bytes())
    assert record.training.best_step == max(history, key=lambda row: (row[2], -row[0]))[0]
    assert record.training.total_parameters == record.training.trainable_parameters

    final = trained.root / "train" / "final"
    network = T5ForConditionalGeneration.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = tokenizer("question 7", add_special_tokens=False).input_ids
    output = network.generate(
        input_ids=torch.tensor([[*ids, tokenizer.eos_token_id]]), max_new_tokens=8, do_sample=False
    )
    expected = tokenizer.decode(output[0], skip_special_tokens=True).strip()
    made = Trained(plan=leg.plan, task=leg.task, config=trained.config, store=leg.store)
    answerer = T5Answerer(made)
    config = GenerateConfig(max_new_tokens=8)
    assert answerer.answer(Ask(question="question 7"), config) == expected
    pieces: list[str] = []
    assert answerer.answer(Ask(question="question 7"), config, pieces.append) == expected
    assert "".join(pieces).strip() == expected


def test_answers_in_a_padded_batch_are_those_given_alone(trained: Any) -> None:
    final = trained.root / "train" / "final"
    network = T5ForConditionalGeneration.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    prompts = [tokenizer(text).input_ids for text in ("q", "question 12", "what is question 3 ?")]
    config = GenerateConfig(max_new_tokens=6)
    together = generate_responses(network, tokenizer, prompts, config)
    alone = [generate_responses(network, tokenizer, [prompt], config) for prompt in prompts]
    assert together is not None
    assert together.texts == [answer.texts[0] for answer in alone if answer is not None]


def test_a_dev_score_that_was_cut_off_is_gone_on_with(
    many: Path, task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = task(many, **SECTIONS), task(many, **SECTIONS)
    for one in (whole, cut):
        one.prepare()
    whole.train()
    answered: list[int] = []
    generate = dev_bleu.generate_responses

    def stopping(*args: Any, **options: Any) -> Any:
        answered.append(len(args[2]))
        if len(answered) == 2:
            cut.stop._handle(15, None)
        return generate(*args, **options)

    monkeypatch.setattr(dev_bleu, "generate_responses", stopping)
    assert cut.train() is Outcome.HANDED_OVER
    assert answered == [2, 2]
    assert len(list((cut.root / "train" / "shards").glob("dev_bleu-000008-*"))) == 2
    cut.stop = type(cut.stop)()
    assert cut.train() is Outcome.FINISHED
    # The third batch of step 8, then all three of step 16.
    assert answered == [2, 2, 1, 2, 2, 1]
    assert curve(cut) == curve(whole)


# --- BLEU ---------------------------------------------------------------------------------------


def by_the_book(predictions: list[str], references: list[str]) -> float:
    """Papineni et al. (2002) over characters: clipped precisions and the brevity penalty."""
    logs = []
    for order in range(1, 5):
        matches = total = 0
        for ours, theirs in zip(predictions, references, strict=True):
            counts = [
                Counter(text[i : i + order] for i in range(len(text) - order + 1))
                for text in (ours, theirs)
            ]
            matches += sum((counts[0] & counts[1]).values())
            total += sum(counts[0].values())
        logs.append(math.log(matches / total))
    length, wanted = (sum(map(len, texts)) for texts in (predictions, references))
    brevity = min(0.0, 1 - wanted / length)
    return 100 * math.exp(brevity + sum(logs) / 4)


def test_character_bleu_is_that_of_the_paper_and_does_not_reward_length() -> None:
    references = ["高血压患者应该少吃盐多运动", "感冒了要多喝水多休息"]
    exact = corpus_bleu(char_statistics(references, references))
    shorter = [text[:8] for text in references]
    longer = [text + "的话说回来就是这样子的" for text in references]
    found = {
        name: corpus_bleu(char_statistics(texts, references))
        for name, texts in (("shorter", shorter), ("longer", longer))
    }
    assert exact == pytest.approx(100)
    assert found["shorter"] == pytest.approx(by_the_book(shorter, references))
    assert found["longer"] == pytest.approx(by_the_book(longer, references))
    assert found["longer"] < 70
    # All that is there is right, so only the brevity penalty takes something away.
    wanted = sum(map(len, references))
    assert found["shorter"] == pytest.approx(100 * math.exp(1 - wanted / 16))
