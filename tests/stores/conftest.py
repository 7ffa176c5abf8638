"""A laboratory of legs, as for the handover tests, with remote stores behind a proxy."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# With --import-mode=importlib the tests' own folders are not on the path.
sys.path.insert(0, str(Path(__file__).parents[1] / "handover"))

# Read when huggingface_hub is imported; only buckets have a Xet server for tests.
os.environ["HF_HUB_DISABLE_XET"] = "1"

from far import KINDS, Far, far_store
from lab import Lab
from zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    # Read when huggingface_hub is imported: offline, it talks to nobody.
    with Zygote(environment={"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}) as started:
        yield started


@pytest.fixture(scope="session")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(zygote, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Far]:
    with far_store(request.param, tmp_path_factory.mktemp("hub")) as started:
        yield started


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    with far_store("s3", tmp_path_factory.mktemp("none")) as started:
        yield started


@pytest.fixture(scope="module")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    with far_store("hub", tmp_path_factory.mktemp("hub")) as started:
        yield started


@pytest.fixture(scope="module")
def bucket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    with far_store("bucket", tmp_path_factory.mktemp("hub")) as started:
        yield started


def _mended(server: Far) -> Iterator[Far]:
    yield server
    server.proxy.clear()


@pytest.fixture
def far(server: Far) -> Iterator[Far]:
    """Each kind of remote store, with no fault left from the test before."""
    yield from _mended(server)


@pytest.fixture
def s3(s3_server: Far) -> Iterator[Far]:
    yield from _mended(s3_server)


@pytest.fixture
def hub(hub_server: Far) -> Iterator[Far]:
    yield from _mended(hub_server)


@pytest.fixture
def bucket(bucket_server: Far) -> Iterator[Far]:
    yield from _mended(bucket_server)
