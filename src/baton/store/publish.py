"""The model card of a task's final weights, for stores that people load models from."""

from __future__ import annotations

import re

from baton.record import EvalRecord
from baton.store.card import CARD, model_card
from baton.store.local import LocalStore

EVAL_RECORD = "eval/eval.json"
FOLDER = "train/final"
_ADAPTER = "adapter_config.json"


def publish(local: LocalStore, url: str) -> str:
    """Write the card of an evaluated task beside its final weights, and return it.

    `url` is that of the task in the store that people will load it from. Empty when the
    pipeline leaves no final weights.
    """
    files = {name.removeprefix(f"{FOLDER}/") for name in local.names(FOLDER)}
    if not files:
        return ""
    record = EvalRecord.from_json(local.read(EVAL_RECORD), where=EVAL_RECORD)
    found = re.match(r"hf://\w+/([^/]+/[^/?]+)/?([^?]*)", url)
    repository, folder = (found[1], found[2]) if found else (url, "")
    card = model_card(
        record,
        repository=repository,
        folder=f"{folder}/{FOLDER}".strip("/"),
        is_adapter=_ADAPTER in files,
    )
    local.write(f"{FOLDER}/{CARD}", card.encode())
    return card
