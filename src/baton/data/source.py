"""Rows of an experiment's data set, from a local file or from the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.config.home import find_file
from baton.data.config import SourceConfig
from baton.data.readers import describe
from baton.data.rows import Reject, Row, Source
from baton.errors import DataError


@dataclass(frozen=True)
class RowSource:
    """One or more files, read one after the other with rows numbered on."""

    files: tuple[Source, ...]

    @property
    def encoding(self) -> str:
        return ", ".join(dict.fromkeys(file.encoding for file in self.files))

    @property
    def columns(self) -> tuple[str, ...]:
        return self.files[0].columns

    def rows(self) -> Iterator[Row | Reject]:
        before = 0
        for file in self.files:
            last = 0
            for row in file.rows():
                last = row.number
                yield _renumbered(row, before)
            before += last


def open_source(config: SourceConfig, *, pinned: str = "") -> RowSource:
    """Find the files of a data set and look at each; `pinned` is the Hub commit to use.

    Raises:
        DataError: a file or column is missing, cannot be decoded, or the Hub is out of reach.
    """
    return RowSource(
        tuple(
            describe(path, encoding=config.encoding, columns=config.columns, format=config.format)
            for path in open_files(config, pinned=pinned)
        )
    )


def open_files(config: SourceConfig, *, pinned: str = "") -> list[Path]:
    """The files of a data set, on this machine. Raises `DataError`."""
    if config.path is not None:
        return [find_file(config.path)]
    return [_fetch(config, name, pinned) for name in config.files] or [_export(config, pinned)]


def _fetch(config: SourceConfig, name: str, pinned: str) -> Path:
    from huggingface_hub import hf_hub_download

    assert config.hub is not None, "SourceConfig gives path or hub"
    try:
        return Path(
            hf_hub_download(
                config.hub, name, repo_type="dataset", revision=pinned or config.revision
            )
        )
    except Exception as error:
        raise DataError(_unreachable(f"{config.hub}/{name}", error)) from error


def _export(config: SourceConfig, pinned: str) -> Path:
    """The split of a Hub data set, as one Parquet file in the data sets' cache."""
    import datasets

    assert config.hub is not None, "SourceConfig gives path or hub"
    try:
        rows = datasets.load_dataset(
            config.hub, config.subset, split=config.split, revision=pinned or config.revision
        )
    except Exception as error:
        raise DataError(_unreachable(config.hub, error)) from error
    path = Path(datasets.config.HF_DATASETS_CACHE) / f"baton-{rows._fingerprint}.parquet"
    if not path.exists():
        beside = path.with_suffix(f".{os.getpid()}.part")
        rows.to_parquet(str(beside))
        os.replace(beside, path)
    return path


def _unreachable(name: str, error: Exception) -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return (
        f"data set {name} could not be loaded from {endpoint}: {type(error).__name__}:"
        f" {(str(error).strip().splitlines() or ['no message'])[0]}. Check the name, set"
        " HF_ENDPOINT to a mirror you can reach, or download the file and use `data.path`"
    )


def _renumbered(row: Row | Reject, before: int) -> Row | Reject:
    if not before:
        return row
    if isinstance(row, Row):
        return Row(row.number + before, row.line, row.values)
    return Reject(row.number + before, row.line, row.reason, row.detail, row.excerpt)
