"""What the Hub's refusals mean for the person whose repository it is, and which may pass."""

from __future__ import annotations

import json
import re

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from baton.errors import StoreBusy, StoreError, StoreRefused

# huggingface_hub 1 carries requests by httpx, 2 by httpx2.
_NETWORK_MODULES = ("httpx", "httpx2", "httpcore", "httpcore2")
# A limit that is reset later than this is no matter of waiting for it.
LONGEST_WAIT_SECONDS = 60.0
# What a server answers that is overloaded or being restarted.
_BUSY = (408, 429, 500, 502, 503, 504)


def status_of(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def is_conflict(error: Exception) -> bool:
    return status_of(error) in (409, 412)


def is_of_network(error: Exception) -> bool:
    """Is this an answer of the server, or of whatever carries requests to it?"""
    # hf_xet reports trouble on the way as Python's own ConnectionError; an answer that was
    # cut off or changed on the way is no JSON.
    known = (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        LocalTokenNotFoundError,
        ConnectionError,
        json.JSONDecodeError,
        UnicodeDecodeError,
    )
    if isinstance(error, known):
        return True
    return type(error).__module__.partition(".")[0] in _NETWORK_MODULES


def may_pass(error: Exception) -> bool:
    """May the same request be taken later?"""
    return status_of(error) in (None, *_BUSY)


def retry_after(error: Exception) -> float | None:
    """Seconds until the limit is reset, as `Retry-After` or `RateLimit: …;t=55` says."""
    response = getattr(error, "response", None)
    if response is None or response.status_code != 429:
        return None
    after = response.headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", after):
        return float(after)
    found = re.search(r"\bt=(\d+)", response.headers.get("ratelimit", ""))
    return float(found[1]) if found else 5.0


def explain(error: Exception, *, where: str, doing: str) -> StoreError:
    """An error of ours that says where, what and what to do."""
    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return StoreRefused(f"{where}: HF_HUB_OFFLINE is set; unset it to use this store")
    place = "bucket" if where.startswith("hf://buckets/") else "repository"
    refused = {
        401: "the token is not valid; set HF_TOKEN to one that is (`hf auth login`)",
        403: f"the token may not do that; it needs write access to this {place}",
        404: f"there is no such {place}, or the token may not see it",
    }
    if status in refused:
        return StoreRefused(f"{where}: {doing}: {refused[status]}")
    if status == 429:
        wait = retry_after(error)
        soon = f"in {wait:.0f} s" if wait is not None else "later"
        kind = StoreBusy if wait is not None and wait <= LONGEST_WAIT_SECONDS else StoreError
        return kind(f"{where}: {doing}: too many requests or commits (128 an hour); again {soon}")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    advice = "" if status else "; check HF_ENDPOINT and the network"
    kind = StoreBusy if may_pass(error) or is_conflict(error) else StoreError
    return kind(f"{where}: {doing}: {lines[0]}{advice}")
