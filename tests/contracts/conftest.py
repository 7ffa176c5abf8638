"""Every kind of store, with the server behind it where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# With --import-mode=importlib the tests' services are not on the path.
sys.path.insert(0, str(Path(__file__).parents[1] / "services"))

# Read when huggingface_hub is imported; only buckets have a Xet server for tests.
os.environ["HF_HUB_DISABLE_XET"] = "1"

from minihub import MiniHub
from s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniHub]:
    with MiniHub(tmp_path_factory.mktemp("hub")) as server:
        yield server
