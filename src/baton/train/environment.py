"""What a result depends on besides the plan: versions, device, threads, world size."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

import baton
from baton.train.ranks import Ranks


def environment_of(ranks: Ranks) -> dict[str, str]:
    """Written into every checkpoint; a leg that differs says so."""
    device = ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")
    return {
        "baton": baton.__version__,
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
        "device": f"{device.type} ({name})",
        "processes": str(ranks.size),
        # On a CPU they decide in which order sums are taken; a GPU does not care.
        **({"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}),
    }


def make_deterministic() -> None:
    """Ask torch for the same bits every time; slower on a GPU, free on a CPU."""
    # cuBLAS reads this when its first handle is made, so it must come before any product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
