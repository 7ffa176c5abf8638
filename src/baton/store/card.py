"""The model card of a finished task: what it is, what it scores, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from baton.record import EvalRecord, ScoreEntry

CARD = "README.md"
_MARK = "<!-- written by baton -->"


def model_card(
    record: EvalRecord,
    *,
    repository: str,
    folder: str,
    is_adapter: bool,
    loading: str | None = None,
) -> str:
    """Markdown with the metadata that the Hub reads.

    Args:
        repository: `user/name`.
        folder: where in it the final weights lie.
        loading: how to load them, where it is not the usual way; `{repository}` and `{folder}`
            stand for the two.
    """
    model = record.model
    hub_base = model["name"] if model.get("source") == "huggingface" else ""
    library = "peft" if is_adapter else "transformers" if loading is None else "baton-jobs"
    head = [f"library_name: {library}"]
    if hub_base:
        head.append(f"base_model: {json.dumps(hub_base)}")
    head.append(f"tags: [baton, {record.pipeline}]")
    revision = f" at revision `{model['revision']}`" if model.get("revision") else ""
    training = record.training
    dev = "" if training.dev_loss is None else f", dev loss {training.dev_loss:.4f}"
    loss = f"step {training.best_step} of {training.steps}{dev}"
    lines = [
        "---",
        *head,
        "---",
        _MARK,
        f"# {record.task} of {record.experiment}",
        "",
        *([f"**{record.notice}**", ""] if record.notice else []),
        f"- Base model: `{model['name']}`{revision} ({model.get('source', 'unknown')})",
        f"- Data: {_data(record)}",
        f"- Weights: {loss}; {training.samples:,} samples, {training.tokens:,} tokens,"
        f" {training.legs} leg{'' if training.legs == 1 else 's'}",
        f"- Plan: `{record.digest}`",
        "",
        "## Scores",
        "",
        "| score | value | 95 % interval | rows | convention |",
        "|---|---:|---|---:|---|",
        *(_row(score) for score in record.scores),
        "",
        f"Generated with: {record.generation.decoding}.",
        "",
        "## How to load it",
        "",
        *(
            _loading(_base(model, repository, folder), repository, folder, is_adapter=is_adapter)
            if loading is None
            else [loading.replace("{repository}", repository).replace("{folder}", folder)]
        ),
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(record.config, indent=2, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)


def is_ours(card: str) -> bool:
    """May this card be replaced? A person's own stays."""
    return _MARK in card


def _data(record: EvalRecord) -> str:
    rows = record.data.get("rows", {})
    if isinstance(rows, dict):
        counted = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    else:
        counted = f"{rows:,}"
    path = record.config.get("data", {}).get("path", "")
    return f"{counted} rows" + (f" of `{path}`" if path else "")


def _row(score: ScoreEntry) -> str:
    return (
        f"| {score.name} ({score.tokenizer}) | {score.value:.4g} | {score.low:.4g} to"
        f" {score.high:.4g} | {score.n} | {score.convention} ({score.library}) |"
    )


def _base(model: Mapping[str, Any], repository: str, folder: str) -> str:
    """What loads the base model: a random one lies beside, others where they came from."""
    if model.get("source") == "random":
        return f'"{repository}", subfolder="{folder.removesuffix("train/final")}base"'
    revision = f', revision="{model["revision"]}"' if model.get("revision") else ""
    return f'"{model["name"]}"{revision}'


def _loading(base: str, repository: str, folder: str, *, is_adapter: bool) -> list[str]:
    if not is_adapter:
        return [
            "```python",
            "from transformers import AutoModel, AutoTokenizer  # or the class of its architecture",
            f'model = AutoModel.from_pretrained("{repository}", subfolder="{folder}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}", subfolder="{folder}")',
            "```",
        ]
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        f'model = PeftModel.from_pretrained(base, "{repository}", subfolder="{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}", subfolder="{folder}")',
        "```",
    ]
