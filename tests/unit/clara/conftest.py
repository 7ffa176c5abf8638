"""What the tests of clara share is in `clara_lab.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from clara_lab import _one_thread, base, learner

__all__ = ["_one_thread", "base", "learner"]
