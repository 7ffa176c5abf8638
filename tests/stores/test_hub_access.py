"""A Hub that lets nobody in, or is not there: what people are told, of repositories and buckets."""

from __future__ import annotations

from pathlib import Path

import pytest
from far import Far

from baton.errors import StoreError, StoreRefused
from baton.store.open import open_remote

URLS = ["hf://models/tester/x", "hf://buckets/tester/x"]


@pytest.mark.parametrize("url", URLS)
def test_no_token(hub: Far, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(StoreRefused, match=r"there is no token; set HF_TOKEN or run `hf auth"):
        open_remote(url)


@pytest.mark.parametrize("url", URLS)
def test_a_token_that_is_not_valid(hub: Far, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(StoreRefused, match="the token is not valid; set HF_TOKEN"):
        open_remote(url)


@pytest.mark.parametrize("url", URLS)
def test_a_hub_that_does_not_answer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(StoreError, match="check HF_ENDPOINT and the network") as raised:
        open_remote(url)
    assert raised.value.exit_status == 1
