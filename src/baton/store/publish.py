"""The model card of a task's final weights, for stores that people load models from."""

from __future__ import annotations

import re
from collections.abc import Sequence

from baton.record import EvalRecord
from baton.store.base import Store
from baton.store.card import CARD, model_card
from baton.store.local import LocalStore

EVAL_RECORD = "eval/eval.json"
_ADAPTER = "adapter_config.json"
# Written last by a stage that trains: where it is, the final weights are complete.
_MARKER = "task.json"
# A pipeline whose weights neither transformers nor PEFT load by themselves says here how to.
LOADING = "LOADING.md"


def final_folder(store: Store, stages: Sequence[str]) -> str | None:
    """Where the final weights of the last of `stages` that has some are."""
    for stage in reversed(stages):
        folder = f"{stage}/final"
        if f"{folder}/{_MARKER}" in set(store.names(folder)):
            return folder
    return None


def publish(local: LocalStore, url: str, stages: Sequence[str]) -> str:
    """Write the card of an evaluated task beside its final weights, and return it.

    `url` is that of the task in the store that people will load it from; `stages` are those
    that train. Empty when the pipeline leaves no final weights.
    """
    final = final_folder(local, stages)
    if final is None:
        return ""
    files = {name.removeprefix(f"{final}/") for name in local.names(final)}
    record = EvalRecord.from_json(local.read(EVAL_RECORD), where=EVAL_RECORD)
    found = re.match(r"hf://\w+/([^/]+/[^/?]+)/?([^?]*)", url)
    repository, folder = (found[1], found[2]) if found else (url, "")
    card = model_card(
        record,
        repository=repository,
        folder=f"{folder}/{final}".strip("/"),
        is_adapter=_ADAPTER in files,
        loading=local.read(f"{final}/{LOADING}").decode() if LOADING in files else None,
    )
    local.write(f"{final}/{CARD}", card.encode())
    return card
