"""Sixty-four rows that a tiny student can learn by heart, and what it answers afterwards."""

from __future__ import annotations

import json
from pathlib import Path

from baton.config.decode import decode
from baton.data.split import split
from baton.eval.answer import Trained
from baton.eval.generate import generate
from baton.eval.score import Score
from baton.pipelines.raft.config import Raft
from baton.pipelines.raft.draw import Draw, Shown
from baton.pipelines.raft.format import load_format
from baton.pipelines.raft.prompt import Prompter
from baton.pipelines.raft.rows import Row, read
from baton.pipelines.raft.scores import Given, score_answers
from baton.record import Plan
from baton.store.local import LocalStore
from baton.tuning.chat import Chat

THINGS = [
    "琥珀",
    "玄武岩",
    "雪松",
    "三角洲",
    "余烬",
    "峡湾",
    "花岗岩",
    "港口",
    "岛屿",
    "茉莉",
    "风筝",
    "灯笼",
]
PLACES = ["山顶", "河边", "海底", "城里", "桥下", "林中", "沙漠", "井里"]
# The format of medical answers with a prompt of few words: what is learnt is the answer.
FORMAT = """\
user: '{% for document in documents %}[文档{{ loop.index }}]{{ document }}
  {% endfor %}{{ question }}'
headings: [问题, 假设/已知信息, CoT推理, 初步诊断建议(含不确定度), 证据引用,
  不足信息与后续建议, 紧急就医指示(红旗症状)]
citation: 文档
quote: {begin: “, end: ”, heading: 证据引用}
admits: [文档中没有足够的证据]
teacher: {questions: '{{ oracle }}', answer: '{{ oracle }}', absent: '{{ question }}'}
"""
EXPERIMENT = """\
pipeline: raft
model:
  source: random
  config: {model_type: qwen2, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 2,
           num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512,
           initializer_range: 0.1}
  tokenizer_vocab: 1500
data: {path: ROWS, format: FORMAT, distractors: 2, p: 0.8, max_length: 256, rows: 64, orders: 4}
adapter: {r: 64, alpha: 128, targets: all-linear}
train: {epochs: EPOCHS, batch_samples: 8, tokens_per_micro_batch: 2048, learning_rate: LR,
        save_every_steps: 1000, eval_every_steps: 10000, log_every_steps: 20}
eval: {generate: {max_new_tokens: 128, batch_size: 32}, bootstrap_resamples: 100}
"""


def write(folder: Path, *, epochs: int = 50, learning_rate: float = 2e-3) -> Path:
    """Write rows, format and experiment to a folder; returns the experiment's path."""
    facts = {(t, p): f"{t}在{p}很多,{p}的人都知道。" for t in THINGS for p in PLACES}
    keys = list(facts)
    lines = []
    for number, (thing, place) in enumerate(keys[:80]):
        question = f"{thing}在{place}多吗?"
        others = [facts[keys[(number + step) % len(keys)]] for step in (5, 17, 40)]
        documents = [{"content": text, "type": "distractor"} for text in others]
        documents.insert(number % 4, {"content": facts[thing, place], "type": "oracle"})
        oracle, other = number % 4 + 1, (number + 1) % 4 + 1
        admitted = f"文档中没有足够的证据。[文档{other}]:“{documents[other - 1]['content']}”"
        lines.append(
            {
                "question": question,
                "documents": documents,
                "teacher_answer": answer(
                    question, f"[文档{oracle}]:“{facts[thing, place]}”", "无。"
                ),
                "absent_answer": answer(question, admitted, "缺少资料。"),
            }
        )
    rows, format, experiment = (folder / name for name in ("rows.jsonl", "mine.yaml", "fit.yaml"))
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    format.write_text(FORMAT)
    text = EXPERIMENT.replace("ROWS", str(rows)).replace("FORMAT", str(format))
    experiment.write_text(text.replace("EPOCHS", str(epochs)).replace("LR", str(learning_rate)))
    return experiment


def answer(question: str, evidence: str, missing: str) -> str:
    return (
        f"问题\n{question}\n假设/已知信息\n无。\nCoT推理\n1. 看文档。\n"
        "初步诊断建议(含不确定度)\n看证据。\n"
        f"证据引用\n{evidence}\n不足信息与后续建议\n{missing}\n紧急就医指示(红旗症状)\n无。"
    )


def chat_of(plan: Plan, folder: Path) -> Chat:
    """The model of the task `fit` in `folder`."""
    task = plan.task("fit")
    config = decode(Raft, task.config)
    return Chat(Trained(plan=plan, task=task, config=config, store=LocalStore(folder)))


def shown_training_row(plan: Plan, folder: Path) -> tuple[Shown, Row]:
    """The first row whose oracle the student was shown, as it was shown first."""
    config = chat_of(plan, folder).trained.config
    rows = read(Path(config.data.path))
    draw = Draw(config.data, load_format(config.data.format), rows)
    train = split(
        len(rows), seed=config.data.seed, shares=config.data.shares, train_rows=config.data.rows
    ).train
    row = next(rows[i] for i in train if draw.is_present(rows[i]))
    return draw.shown(row), row


def scores_on_training_rows(plan: Plan, folder: Path) -> dict[str, Score]:
    """What the student answers to the very prompts that it was trained on, scored."""
    chat = chat_of(plan, folder)
    config: Raft = chat.trained.config
    format, rows = load_format(config.data.format), read(Path(config.data.path))
    draw = Draw(config.data, format, rows)
    prompter = Prompter(chat.tokenizer, format, max_length=config.data.max_length)
    parts = split(
        len(rows), seed=config.data.seed, shares=config.data.shares, train_rows=config.data.rows
    )
    answers, given = [], []
    for start in range(0, len(parts.train), 32):
        batch = [rows[i] for i in parts.train[start : start + 32]]
        shown = [draw.shown(row) for row in batch]
        prompts = [
            prompter.prompt_text(row.question, s.documents)
            for row, s in zip(batch, shown, strict=True)
        ]
        ends = (prompter.end_of_turn,)
        replied = generate(chat.model, chat.tokenizer, prompts, config.eval.generate, ends=ends)
        assert replied is not None
        answers += replied.texts
        given += [Given(documents=s.documents, oracle=s.oracle, reference=s.target) for s in shown]
    sheet = score_answers(answers, given, format, seed=0, resamples=100)
    return {score.column: score for score in sheet.scores}
