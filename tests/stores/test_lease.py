"""How a leg gets its lease, and what a renewal must survive, on every kind of remote store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from far import Far

from baton.errors import BatonError, FencedError, NameTaken
from baton.store.base import Batch
from baton.store.open import open_remote

LEASE = "legs/001.json"


def test_of_sixteen_that_claim_at_once_one_wins(far: Far) -> None:
    url = far.url()

    def claims(number: int) -> bool:
        try:
            open_remote(url).write(LEASE, b"%d" % number, exclusive=True)
        except NameTaken:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = [number for number, has_won in enumerate(pool.map(claims, range(16))) if has_won]
    assert [b"%d" % number for number in won] == [open_remote(url).read(LEASE)]


def test_a_renewal_that_arrived_and_was_never_answered_is_ours(far: Far) -> None:
    """The network breaks down after a request: what is there later is no other leg's."""
    store = open_remote(far.url())
    store.write(LEASE, b"1", exclusive=True)
    store.commit(Batch(message="", lease=(LEASE, b"2")))
    method, path = {
        "s3": ("PUT", LEASE),
        "hub": (".*", "/commits?/"),
        "bucket": ("POST", "/batch"),
    }[far.kind]
    lost = far.proxy.rule(action="swallow", method=method, path=path)
    far.proxy.rule(action="status", status=403, method=method, path=path, times=100)
    with pytest.raises(BatonError) as raised:
        store.commit(Batch(message="", lease=(LEASE, b"3")))
    assert not isinstance(raised.value, FencedError)
    assert lost.hits == 1
    far.proxy.clear()
    assert open_remote(store.url).read(LEASE) == b"3"
    store.commit(Batch(message="", lease=(LEASE, b"5")))
    assert store.read(LEASE) == b"5"
    # What was ours once is not for ever.
    open_remote(store.url).write(LEASE, b"3")
    with pytest.raises(FencedError):
        store.commit(Batch(message="", lease=(LEASE, b"6")))
