"""A store in a bucket of the Hugging Face Hub: objects, not commits, and none of their limits."""

from __future__ import annotations

import importlib.util
from urllib.parse import parse_qsl, urlsplit

from huggingface_hub import HfApi

from baton.errors import ConfigError
from baton.store.base import check_name
from baton.store.hub_bucket import HubBucket
from baton.store.objects import ObjectStore
from baton.store.patience import IMPATIENT, Patience

_STALE_SECONDS = 86_400.0


class HubBucketStore(ObjectStore):
    """What comes back is compared with the hash that Xet calls it by."""

    # Each is a handful of requests, of which the Hub takes a thousand in five minutes.
    heartbeat_seconds = 60.0
    lost_after_seconds = 240.0

    _bucket: HubBucket

    @property
    def url(self) -> str:
        return super().url + self._bucket.query

    def sweep_uploads(self) -> list[str]:
        """Remove what was begun for an exclusive write a day ago; returns its keys."""
        return self._bucket.sweep(_STALE_SECONDS)

    @classmethod
    def open(cls, url: str, patience: Patience = IMPATIENT) -> HubBucketStore:
        """The store `hf://buckets/user/bucket` or a folder in one.

        The bucket is created at the first write, private unless the URL says
        `?visibility=public`.

        Raises:
            ConfigError: the URL is none of these, or huggingface_hub knows no buckets.
            StoreRefused: there is no token, or it may not look.
        """
        parsed = urlsplit(url)
        parts = [part for part in f"{parsed.netloc}{parsed.path}".split("/") if part][1:]
        if len(parts) < 2:
            raise ConfigError(f"store {url!r}: name a bucket: hf://buckets/user/bucket")
        options = dict(parse_qsl(parsed.query))
        if unknown := sorted(set(options) - {"visibility"}):
            raise ConfigError(f"store {url!r}: unknown option {unknown[0]!r}")
        if not hasattr(HfApi, "batch_bucket_files") or not importlib.util.find_spec("hf_xet"):
            raise ConfigError(
                f"store {url!r}: this huggingface_hub knows no buckets; pip install -U"
                " huggingface_hub hf_xet, or name a repository (hf://user/repository)"
            )
        prefix = "/".join(parts[2:])
        bucket = HubBucket(
            name="/".join(parts[:2]),
            is_private=options.get("visibility", "private") != "public",
            query=f"?{parsed.query}" if parsed.query else "",
            patience=patience,
        )
        bucket.look()
        return cls(bucket, f"hf://buckets/{bucket.name}", check_name(prefix) if prefix else "")
