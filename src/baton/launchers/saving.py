"""How long saving has taken after a signal, as far as earlier legs have measured it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.errors import BatonError
from baton.legs import Legs, utc_now
from baton.record import Plan
from baton.store.local import LocalStore


@dataclass(frozen=True)
class Save:
    """One measured save."""

    seconds: float
    where: str


def slowest_save(root: Path, plan: Plan) -> Save | None:
    """The longest time from signal to durable: of this plan, else of its newest forerunner."""
    folder = root / plan.experiment
    others = [path.parent for path in folder.glob("*/plan.json") if path.parent.name != plan.digest]
    newest_first = sorted(others, key=lambda other: other.stat().st_mtime, reverse=True)
    for place in (folder / plan.digest, *newest_first):
        found = max(_saves(place), key=lambda save: save.seconds, default=None)
        if found is not None:
            return found
    return None


def _saves(folder: Path) -> Iterator[Save]:
    for task in sorted((folder / "tasks").glob("*/legs")):
        try:
            history = Legs(LocalStore(task.parent), task.parent.name, utc_now).history()
        except BatonError:
            continue  # a record of a newer baton, or a damaged one: not what this is about
        for leg in history:
            if leg.signal_to_durable_seconds is not None:
                where = f"leg {leg.number} of {task.parent.name}"
                yield Save(leg.signal_to_durable_seconds, where)
