"""What several folders of unit tests share can be imported from here and from the services."""

from __future__ import annotations

import sys
from pathlib import Path

# With --import-mode=importlib these folders are not on the path.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "services")]
