"""Checkpoints of a task in a remote store: large files by content, the manifest last."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.errors import DamagedError, NameMissing
from baton.record import FileEntry, Manifest, dump_json
from baton.store.base import Batch, Remote, Wanted
from baton.store.checkpoint import MANIFEST, SET_ASIDE, Checkpoints, verify_file

BLOBS = "blobs"
# A file smaller than this lies beside its manifest: asking whether it is there already costs
# as much as sending it, and one bad byte should not hurt two checkpoints.
SMALL_BYTES = 8 * 2**10


def is_blob(store: Remote, size: int) -> bool:
    """Is a file of this size kept under its content's name in `store`?"""
    return size >= SMALL_BYTES and not store.shares_content


def blob_name(sha256: str) -> str:
    return f"{BLOBS}/{sha256}"


@dataclass(frozen=True)
class Archive:
    """The checkpoints below `prefix` in `store`, which is the place of an experiment's version.

    Large files lie in `blobs/` under their SHA-256, shared by all tasks of the version, so
    what did not change is never sent again.
    """

    store: Remote
    prefix: str

    @property
    def checkpoints(self) -> Checkpoints:
        """The names and manifests, which look as in any store."""
        return Checkpoints(self.store, self.prefix, 0, lambda: None, lambda: "")

    def steps(self) -> list[int]:
        """Steps with a manifest, oldest first."""
        return self.checkpoints.steps()

    def place(self, step: int, entry: FileEntry) -> str:
        """The name under which a file of a checkpoint is stored."""
        if is_blob(self.store, entry.size):
            return blob_name(entry.sha256)
        return self.checkpoints.name(step, entry.name)

    def sending(self, step: int, folder: Path, manifest: Manifest, data: bytes) -> Batch:
        """What makes `folder`, whose manifest is `data`, the checkpoint of `step` here."""
        places = {self.place(step, entry): folder / entry.name for entry in manifest.files}
        blobs = {name: path for name, path in places.items() if name.startswith(f"{BLOBS}/")}
        return Batch(
            message=f"{self.prefix.removesuffix('/checkpoints')}: step {step}",
            blobs=blobs,
            writes={name: path for name, path in places.items() if name not in blobs},
            marker=(self.checkpoints.name(step, MANIFEST), data),
        )

    def fetch(self, step: int, target: Path) -> tuple[Manifest, bytes]:
        """Bring a checkpoint to `target`, every byte verified; goes on from an earlier try.

        Raises:
            DamagedError: a file is missing or is not what the manifest promises.
        """
        manifest = self.checkpoints.manifest(step)
        data = self.store.read(self.checkpoints.name(step, MANIFEST))
        try:
            self.store.fetch(
                [
                    Wanted(
                        name=self.place(step, entry),
                        size=entry.size,
                        sha256=entry.sha256,
                        target=target / entry.name,
                    )
                    for entry in manifest.files
                    if not _is_here(target / entry.name, entry)
                ]
            )
        except (NameMissing, DamagedError) as error:
            raise DamagedError(f"step-{step:06d}: {_file_of(manifest, error)}") from error
        for entry in manifest.files:
            verify_file(target / entry.name, entry, f"step-{step:06d}")
        return manifest, data

    def set_aside(self, step: int, reason: str) -> None:
        """Take a damaged checkpoint out of use; its files stay for a person to look at."""
        self.store.commit(
            Batch(
                message=f"{self.prefix}: step {step} is damaged",
                writes={self.checkpoints.name(step, SET_ASIDE): dump_json({"reason": reason})},
                deletes=(self.checkpoints.name(step, MANIFEST),),
                urgent=True,
            )
        )

    def dropping(self, steps: Collection[int], manifests: Mapping[str, Manifest]) -> list[str]:
        """Names to delete so that `steps` are gone: manifests first, then what only they need.

        `manifests` are those of the whole version, by name.
        """
        if not steps:
            return []
        mine = {self.checkpoints.name(step) for step in steps}
        gone = {name for name in manifests if name.removesuffix(f"/{MANIFEST}") in mine}
        needed = {e.sha256 for n, m in manifests.items() if n not in gone for e in m.files}
        blobs = {
            blob_name(entry.sha256)
            for name in gone
            for entry in manifests[name].files
            if is_blob(self.store, entry.size) and entry.sha256 not in needed
        }
        beside = [
            name
            for folder in sorted(mine)
            for name in self.store.names(folder)
            if not name.endswith(f"/{MANIFEST}")
        ]
        return [*sorted(gone), *beside, *sorted(blobs)]


def _is_here(path: Path, entry: FileEntry) -> bool:
    try:
        verify_file(path, entry, "")
    except DamagedError:
        return False
    return True


def _file_of(manifest: Manifest, error: Exception) -> str:
    """The error, with the file's own name where the store knows only its content's."""
    text = str(error)
    for entry in manifest.files:
        if entry.sha256 in text and entry.name not in text:
            return f"{entry.name}: {text}"
    return text
