"""What training made, taken out of the store: a folder or a zip file for other tools."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from baton.errors import ConfigError
from baton.store.base import Store, explained
from baton.store.publish import final_folder

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
        raise ConfigError(
            f"{task} has no final model yet; train it to the end first: baton submit {task}"
        )
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
