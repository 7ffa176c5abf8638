"""Commits behind Hub revisions, looked up once at the first submission and kept in the plan."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from baton.errors import DataError, ModelError, StopError

Kind = Literal["model", "dataset"]


def pins_of(config: Any) -> Iterator[tuple[Kind, str, str]]:
    """Kind, name and revision of everything in a configuration that the Hub versions.

    A model is any dataclass with `source: huggingface`, a data set any with a `hub`.
    """
    if getattr(config, "source", None) == "huggingface":
        yield "model", config.name, config.revision
    if getattr(config, "hub", None):
        yield "dataset", config.hub, config.revision
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from pins_of(getattr(config, field.name))


def look_up(kind: Kind, name: str, revision: str) -> str:
    """The commit behind a revision; without a network, that of a downloaded copy.

    Raises:
        ModelError, DataError: there is no such thing, or no way to know.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    failure: type[StopError] = ModelError if kind == "model" else DataError
    try:
        return str(HfApi().repo_info(name, revision=revision, repo_type=kind).sha)
    except GatedRepoError as error:
        raise failure(f"{name} is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise failure(
            f"the Hub has no {kind} {name!r} at revision {revision!r}"
            " (or it is private and HF_TOKEN is missing)"
        ) from error
    # Which HTTP library the Hub's client raises from changes with its version.
    except Exception as offline:  # noqa: BLE001
        try:
            folder = snapshot_download(
                name, revision=revision, repo_type=kind, local_files_only=True
            )
        except (OSError, ValueError):
            raise failure(unreachable(name, offline, kind)) from offline
        return Path(folder).name


def unreachable(name: str, error: Exception, kind: Kind = "model") -> str:
    """What to tell somebody without a network, with the three ways out."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    second = "use `source: modelscope`" if kind == "model" else "name another data set"
    third = "`source: path`" if kind == "model" else "`data.path`"
    return (
        f"{name} could not be fetched from {endpoint} ({type(error).__name__}) and is not in the"
        f" cache. Three ways out: set HF_ENDPOINT to a mirror you can reach; {second};"
        f" or download it elsewhere and use {third}"
    )
