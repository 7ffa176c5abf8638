"""What the names of a task's files tell: which grow, which promise something, how far it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from baton.store.checkpoint import MANIFEST

# Files that only grow while a leg works: sent under their own names, again and again.
GROWING = re.compile(r"log\.txt|(.*/)?metrics\.jsonl|(.*/)?tensorboard/.*")
CHECKPOINT_FILE = re.compile(r"(.+/checkpoints)/step-(\d{6,})/(.+)")
LEG = re.compile(r"legs/(\d{3,})\.json")
DONE = re.compile(r"([^/]+)/done\.json")
PROGRESS, LOG, FILES = "progress.json", "log.txt", "files.json"
CANCELLED = "cancelled.json"
# What a compiler made: of use, never needed.
COMPILED = "compiled/"


def position_of(names: Collection[str], stages: Sequence[str]) -> list[int]:
    """What is durable of a task: stages done, and of the next one the newest step and shards.

    Grows with every bit of progress; two legs that start at the same position have nothing
    between them.
    """
    done = sum(f"{stage}/done.json" in names for stage in stages)
    stage = next((s for s in stages if f"{s}/done.json" not in names), None)
    if stage is None:
        return [done, 0, 0]
    steps = newest_steps(names)
    shards = sum(1 for name in names if re.fullmatch(rf"{re.escape(stage)}/shards/[^/]+", name))
    return [done, steps.get(f"{stage}/checkpoints", 0), shards]


def newest_steps(names: Collection[str]) -> dict[str, int]:
    """The newest complete step below each folder of checkpoints."""
    newest: dict[str, int] = {}
    for name in names:
        found = CHECKPOINT_FILE.fullmatch(name)
        if found and found[3] == MANIFEST:
            newest[found[1]] = max(int(found[2]), newest.get(found[1], 0))
    return newest


def newest_leg(names: Iterable[str]) -> int:
    """The number of the newest leg; 0 without one."""
    return max((int(found[1]) for name in names if (found := LEG.fullmatch(name))), default=0)


def is_mirrored(name: str) -> bool:
    """Files that are sent as they are; checkpoints, legs and heartbeats go their own ways."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    own_way = CHECKPOINT_FILE.fullmatch(name) or LEG.fullmatch(name)
    aside = name in (PROGRESS, FILES, CANCELLED) or name.endswith(".part")
    return not (hidden or own_way or aside)
