"""The checkpoint that answers: the best by dev score or loss that is whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from baton.errors import DamagedError, NameMissing
from baton.store.base import Store
from baton.store.checkpoint import Checkpoints
from baton.train.state import badness

log = logging.getLogger(__name__)

TRAIN = "train"
# Dev losses and scores of a training stage, written at its end.
HISTORY = "dev_history.json"


def fetch_best(
    checkpoints: Checkpoints, store: Store, target: Path, *, task: str, stage: str = TRAIN
) -> int:
    """Copy the best checkpoint that is whole to `target`; returns its step.

    Before training is finished there is no history of dev losses: the newest is taken then.

    Raises:
        DamagedError: there is none.
    """
    try:
        history = json.loads(store.read(f"{stage}/{HISTORY}"))
    except NameMissing:
        history = []
    rank = {int(row[0]): badness(row) for row in history}
    # Of equals the earlier, as retention keeps it; of those never evaluated the newest.
    steps = sorted(
        checkpoints.everywhere(), key=lambda s: (rank[s], s) if s in rank else (float("inf"), -s)
    )
    best = min(rank, key=lambda s: (rank[s], s), default=None)
    if best is not None and steps and best not in steps:
        log.warning("step-%06d, the best of %s, is not there; the next best is used", best, task)
    for step in steps:
        try:
            checkpoints.fetch_anywhere(step, target)
            return step
        except DamagedError as error:
            log.warning("%s; the next best checkpoint is used instead", error)
    raise DamagedError(
        f"{task}: no checkpoint is whole; remove {stage}/done.json from the task's folder"
        " and submit again to train anew"
    )
