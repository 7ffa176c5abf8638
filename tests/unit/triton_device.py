"""Where Triton's kernels can be tried: a GPU, or Triton's interpreter (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not _INTERPRETED else "cpu")
_HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_kernels = pytest.mark.skipif(
    not _HAS_TRITON or (DEVICE.type == "cpu" and not _INTERPRETED),
    reason="needs a GPU, or Triton's interpreter: pip install triton, TRITON_INTERPRET=1",
)
