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
# Stands in a card for wherever its reader has put the folder.
_ANYWHERE = "path/to/this/folder"


def final_folder(store: Store, stages: Sequence[str]) -> str | None:
    """Where the final weights of the last of `stages` that has some are."""
    for stage in reversed(stages):
        folder = f"{stage}/final"
        if f"{folder}/{_MARKER}" in set(store.names(folder)):
            return folder
    return None


def publish(local: LocalStore, url: str, stages: Sequence[str]) -> str:
    """Write the card of an evaluated task beside its final weights, and return it.

    `url` is that of the task in the store that people will load it from, empty where nobody
    knows yet; `stages` are those that train. Empty when the pipeline leaves no final weights.
    """
    final = final_folder(local, stages)
    if final is None:
        return ""
    repository, folder = address(url) if url else (_ANYWHERE, "")
    inside = f"{folder}/{final}".strip("/") if url else ""
    card = card_of(local, final, repository=repository, folder=inside)
    local.write(f"{final}/{CARD}", card.encode())
    return card


def address(url: str) -> tuple[str, str]:
    """Repository and folder of a store's URL; another store is all repository."""
    found = re.match(r"hf://\w+/([^/]+/[^/?]+)/?([^?]*)", url)
    return (found[1], found[2].strip("/")) if found else (url, "")


def card_of(store: Store, final: str, *, repository: str, folder: str) -> str:
    """The card of the weights in the folder `final` of an evaluated task."""
    files = {name.removeprefix(f"{final}/") for name in store.names(final)}
    return model_card(
        EvalRecord.from_json(store.read(EVAL_RECORD), where=EVAL_RECORD),
        repository=repository,
        folder=folder,
        is_adapter=_ADAPTER in files,
        loading=store.read(f"{final}/{LOADING}").decode() if LOADING in files else None,
    )
