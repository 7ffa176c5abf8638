"""What training made, taken out of the store: a folder or a zip file for other tools."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from baton.errors import ConfigError
from baton.store.base import Batch, Store, explained
from baton.store.card import CARD
from baton.store.open import open_remote
from baton.store.publish import EVAL_RECORD, address, card_of, final_folder

# Zip files of the same bytes are the same bytes; this is the oldest date they can hold.
_DATE = (1980, 1, 1, 0, 0, 0)


def export(store: Store, out: Path, *, task: str, stages: Sequence[str]) -> list[str]:
    """Copy the final model of a task to the folder `out`, or into it where it ends in `.zip`.

    It is that of the last of `stages` that has one. `out` appears only when it is complete.
    Returns the names of the files.

    Raises:
        ConfigError: there is no final model yet, or something else is at `out`.
    """
    final = final_folder(store, stages)
    if final is None:
        raise ConfigError(_missing(task))
    names = sorted(store.names(final))
    is_zip = out.suffix.lower() == ".zip"
    if not is_zip and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: something is there already; name a new folder or a .zip")
    beside, ready = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.ready")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for name in names:
            store.download(name, beside / name.removeprefix(f"{final}/"))
        if is_zip:
            _pack(beside, ready)
        else:
            # Files of a local store come as hard links; what a person edits must be a copy.
            shutil.rmtree(ready, ignore_errors=True)
            shutil.copytree(beside, ready)
        os.replace(ready, out)
    except OSError as error:
        raise explained(error, f"writing {out}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [name.removeprefix(f"{final}/") for name in names]


def export_to_hub(store: Store, url: str, *, task: str, stages: Sequence[str]) -> list[str]:
    """Put the final model of a task into a repository of the Hub, as one commit, with its card.

    `url` is `hf://user/repository`, or a folder in one; a new repository is private unless
    `?visibility=public` says otherwise. Returns the names of the files.

    Raises:
        ConfigError: there is no final model yet, or `url` names no repository.
        StoreRefused: there is no token, or it may not write.
    """
    final = final_folder(store, stages)
    if final is None:
        raise ConfigError(_missing(task))
    remote = open_remote(url)
    if not remote.publishes:
        raise ConfigError(
            f"{url}: nobody loads models from a bucket; name a repository: hf://user/repository"
        )
    with tempfile.TemporaryDirectory(prefix="baton-export-") as folder:
        writes: dict[str, bytes | Path] = {}
        for name in sorted(store.names(final)):
            inside = name.removeprefix(f"{final}/")
            store.download(name, Path(folder) / inside)
            writes[inside] = Path(folder) / inside
        if EVAL_RECORD in set(store.names("eval")):
            repository, place = address(remote.url)
            card = card_of(store, final, repository=repository, folder=place)
            writes[CARD] = card.encode()
        remote.commit(Batch(message=f"export {task}", writes=writes, urgent=True))
    return list(writes)


def _missing(task: str) -> str:
    return f"{task} has no final model yet; train it to the end first: baton submit {task}"


def _pack(folder: Path, target: Path) -> None:
    # Weights do not get smaller, so nothing is compressed.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _DATE)
            info.external_attr = 0o644 << 16
            with open(path, "rb") as source, archive.open(info, "w", force_zip64=True) as packed:
                shutil.copyfileobj(source, packed)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
