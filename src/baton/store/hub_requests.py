"""What every request to the Hub has in common: whom to ask, again how often, and the token."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from baton.errors import NameMissing, StoreRefused
from baton.store.hub_errors import (
    LONGEST_WAIT_SECONDS,
    explain,
    is_of_network,
    may_pass,
    retry_after,
    status_of,
)

T = TypeVar("T")

ATTEMPTS = 6
# BucketNotFoundError is none of the others.
_MISSING = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)


def hub_api() -> HfApi:
    """The Hub that `HF_ENDPOINT` names, as it is now."""
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def asked(request: Callable[[], T], *, where: str, doing: str, repeats_itself: bool = False) -> T:
    """The answer to a request, made again a few times while the trouble may pass.

    Where huggingface_hub itself goes on asking for 23 s (`repeats_itself`), only what it gives up
    at once is asked again: an answer that was changed on the way, trouble that hf_xet had.

    Raises:
        NameMissing: it is not there.
        StoreRefused: the token is missing, not valid, or may not do that.
        StoreError: the Hub, or the way to it, is in trouble.
    """
    attempts = 2 if repeats_itself else ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return request()
        except Exception as error:
            if status_of(error) == 401:
                # Said to strangers also where there is nothing.
                require_token(where)
                raise explain(error, where=where, doing=doing) from error
            if is_missing(error):
                raise NameMissing(f"{where}: {doing}: it is not there") from None
            if not is_of_network(error):
                raise
            wait = retry_after(error)
            was_repeated = repeats_itself and status_of(error) is not None
            last = attempt == attempts or (wait or 0) > LONGEST_WAIT_SECONDS
            if last or was_repeated or not may_pass(error):
                raise explain(error, where=where, doing=doing) from error
            time.sleep(wait if wait is not None else 0.1 * 2**attempt)
    raise AssertionError("every attempt returns or raises")


def is_missing(error: Exception) -> bool:
    """Does the Hub say that there is no such thing?"""
    return isinstance(error, _MISSING) or type(error).__name__ == "BucketNotFoundError"


def require_token(where: str) -> None:
    """Raises `StoreRefused` if there is no token."""
    if get_token() is None:
        raise StoreRefused(f"{where}: there is no token; set HF_TOKEN or run `hf auth login`")


def require_identity(where: str) -> None:
    """The Hub says "not found" to strangers as well. Raises `StoreRefused` if we are one."""
    require_token(where)
    asked(hub_api().whoami, where=where, doing="asking who we are")
