"""How much memory a stage takes, said at its edges and at every validation."""

from __future__ import annotations

import resource

import psutil
import torch

from baton.stage import Leg

_GIB = 2**30


def log_memory(leg: Leg, device: torch.device, where: str) -> None:
    """One line: allocated, reserved and peak on a GPU; resident and peak of the process."""
    process = psutil.Process()
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = {
        "resident_gib": process.memory_info().rss / _GIB,
        "peak_resident_gib": peak_kb / 2**20,
    }
    if device.type == "cuda":
        values |= {
            "allocated_gib": torch.cuda.memory_allocated(device) / _GIB,
            "reserved_gib": torch.cuda.memory_reserved(device) / _GIB,
            "peak_gib": torch.cuda.max_memory_allocated(device) / _GIB,
        }
    leg.log("memory", where=where, **{name: round(v, 3) for name, v in values.items()})
