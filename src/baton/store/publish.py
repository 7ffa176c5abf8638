"""The final weights of a task in a folder of their own, with a model card."""

from __future__ import annotations

import re

from baton.record import EvalRecord
from baton.store.card import ADAPTER, CARD, model_card
from baton.store.local import LocalStore

EVAL_RECORD = "eval/eval.json"
FOLDER = "final"
_MODEL = "model.safetensors"


def publish(local: LocalStore, url: str) -> str | None:
    """Lay out `final/` of a task that is evaluated; returns its card.

    `url` is that of the task in the store that people will load it from. None when there is
    nothing to load: the evaluated checkpoint is not on this machine, or holds no weights.
    """
    record = EvalRecord.from_json(local.read(EVAL_RECORD), where=EVAL_RECORD)
    place = f"train/checkpoints/step-{record.training.best_step:06d}"
    inside = {name.removeprefix(f"{place}/"): name for name in local.names(place)}
    adapter = {n.partition("/")[2]: full for n, full in inside.items() if n.startswith(ADAPTER)}
    weights = adapter or {n: full for n, full in inside.items() if n == _MODEL}
    if not weights:
        return None
    for name, full in weights.items():
        local.delete(f"{FOLDER}/{name}")
        local.upload(local.path(full), f"{FOLDER}/{name}")
    found = re.match(r"hf://\w+/([^/]+/[^/?]+)/?([^?]*)", url)
    repository, folder = (found[1], found[2]) if found else (url, "")
    card = model_card(
        record,
        repository=repository,
        folder=f"{folder}/{FOLDER}".strip("/"),
        is_adapter=bool(adapter),
    )
    local.write(f"{FOLDER}/{CARD}", card.encode())
    return card
