"""Can Triton make kernels for a GPU, on this machine?"""

from __future__ import annotations

import functools
import importlib.util
import shutil

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def why_not_launched(device: torch.device) -> str:
    """Why Triton cannot make kernels for `device`; empty if it can."""
    if device.type != "cuda":
        return "there is no GPU"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is too old for Triton"
    if not HAS_TRITON:
        return "the triton package is missing"
    # Triton builds a small launcher in C for every kernel.
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "no C compiler (install gcc)"
    return ""


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Do our kernels run on `device`? Their products want the tensor cores of Ampere and later."""
    return not why_not_launched(device) and torch.cuda.get_device_capability(device) >= (8, 0)


def can_launch(x: torch.Tensor) -> bool:
    """Are there kernels for this tensor? They compute in 16 or 32 bits."""
    return x.dtype.itemsize <= 4 and has_kernels(x.device)
