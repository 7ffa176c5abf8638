"""Where Triton's kernels can be tried: a GPU, or Triton's interpreter (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not _INTERPRETED else "cpu")
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_WITHOUT = pytest.mark.skipif(
    not _HAS_TRITON or (DEVICE.type == "cpu" and not _INTERPRETED),
    reason="needs a GPU, or Triton's interpreter: make test-kernels",
)


def needs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """A test of our kernels: `make test-kernels` runs it, and `make test` on a GPU."""
    return pytest.mark.kernels(_WITHOUT(test))
