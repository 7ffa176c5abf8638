"""One zygote and one laboratory for all handover tests of a pytest worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# With --import-mode=importlib the tests' own folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))

from lab import Lab
from zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture(scope="session")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(zygote, tmp_path_factory.mktemp("lab"))
