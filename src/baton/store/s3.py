"""A store in a bucket of any server that speaks S3: AWS, MinIO, Ceph, R2 and others."""

from __future__ import annotations

from baton.errors import ConfigError
from baton.store.base import check_name
from baton.store.objects import ObjectStore
from baton.store.patience import IMPATIENT, Patience
from baton.store.s3_bucket import S3Bucket

_STALE_SECONDS = 86_400.0


class S3Store(ObjectStore):
    """Every object carries the SHA-256 of its bytes.

    The bytes of a part are covered on their way: by the signature over plain HTTP, by a
    checksum header beside TLS. What comes back is compared with the SHA-256.
    """

    heartbeat_seconds = 15.0
    lost_after_seconds = 90.0
    _bucket: S3Bucket

    @classmethod
    def open(cls, url: str, patience: Patience = IMPATIENT) -> S3Store:
        """The store `s3://bucket/prefix`.

        Endpoint, region, profile and credentials are found where every AWS tool looks.

        Raises:
            StoreRefused: no such bucket, or no permission to list it.
        """
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not bucket:
            raise ConfigError(f"store {url!r}: no bucket is named; use s3://bucket/prefix")
        if prefix:
            check_name(prefix)
        opened = S3Bucket.open(bucket, patience)
        opened.list_page(prefix, limit=1)
        return cls(opened, f"s3://{bucket}", prefix)

    def sweep_uploads(self) -> list[str]:
        """End multipart uploads that nobody has finished for a day; returns their names."""
        ended = self._bucket.abort_uploads(self._prefix, _STALE_SECONDS)
        return [key.removeprefix(self._prefix) for key in ended]
