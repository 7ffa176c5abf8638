"""A store in a repository of the Hugging Face Hub: one commit for all that belongs together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from baton.errors import ConfigError, DamagedError, NameMissing, NameTaken, StoreError
from baton.store.base import Batch, Listed, Wanted, check_name
from baton.store.card import CARD, is_ours
from baton.store.hub_repository import LEDGER, Files, HubFile, Operation, Repository
from baton.store.parallel import all_of
from baton.store.patience import IMPATIENT, Patience

_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
# Written by the Hub when a repository is created.
_HIDDEN = (".gitattributes", LEDGER)


class HubStore:
    """Names are paths below `prefix` on the branch `main` of a repository.

    The Hub keeps equal large files once (LFS, Xet), so every checkpoint has its own paths and
    can be loaded from there. Each write is a commit on top of the one that was looked at; if
    somebody else was faster, it is looked at again.
    """

    shares_content = True
    publishes = True
    # A commit each: five minutes of twelve an hour.
    heartbeat_seconds = 300.0
    lost_after_seconds = 900.0

    def __init__(self, repository: Repository, prefix: str = "") -> None:
        self.repository = repository
        self._prefix = f"{prefix}/" if prefix else ""

    @classmethod
    def open(cls, url: str, patience: Patience = IMPATIENT) -> HubStore:
        """The store `hf://user/repository`, `hf://datasets/user/repository` or a folder in one.

        `?visibility=public` creates a public repository instead of a private one, and
        `?squash=yes` makes one commit of its history when a task is finished.

        Raises:
            ConfigError: the URL is none of these.
            StoreRefused: there is no token, or it may not look.
        """
        parsed = urlsplit(url)
        parts = [part for part in f"{parsed.netloc}{parsed.path}".split("/") if part]
        kind = _KINDS[parts.pop(0)] if parts and parts[0] in _KINDS else "model"
        if len(parts) < 2:
            raise ConfigError(f"store {url!r}: name a repository: hf://user/repository")
        options = dict(parse_qsl(parsed.query))
        unknown = set(options) - {"visibility", "squash"}
        if unknown:
            raise ConfigError(f"store {url!r}: unknown option {sorted(unknown)[0]!r}")
        repository = Repository(
            name="/".join(parts[:2]),
            kind=kind,
            is_private=options.get("visibility", "private") != "public",
            is_squashed=options.get("squash") in ("yes", "true", "1"),
            query=f"?{parsed.query}" if parsed.query else "",
            patience=patience,
        )
        repository.refresh()
        prefix = "/".join(parts[2:])
        return cls(repository, check_name(prefix) if prefix else "")

    @property
    def url(self) -> str:
        repository = self.repository
        return f"hf://{repository.kind}s/{repository.name}/{self._prefix}".rstrip("/") + (
            repository.query
        )

    def below(self, prefix: str) -> Self:
        return type(self)(self.repository, self._prefix + check_name(prefix))

    def wait_seconds(self) -> float:
        return self.repository.budget.wait_seconds()

    # --- the six methods ----------------------------------------------------------------

    def read(self, name: str) -> bytes:
        path = self._path(name)
        files = self.repository.refresh()
        return self.repository.read(self._found(files, path), path)

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        path = self._path(name)
        add = CommitOperationAdd(path, data)

        def build(files: Files) -> list[Operation]:
            _refuse_below(files, path)
            if exclusive and path in files:
                raise NameTaken(f"{self._what(path)} is already stored")
            return [add]

        # A claim is small and somebody waits for it.
        self.repository.commit(f"{name}", build, urgent=True)

    def upload(self, source: Path, name: str) -> None:
        path = self._path(name)
        if not source.is_file():
            raise StoreError(f"{source} is not a file")
        add = CommitOperationAdd(path, source)

        def build(files: Files) -> list[Operation]:
            _refuse_below(files, path)
            if path in files:
                raise NameTaken(f"{self._what(path)} is already stored")
            return [add]

        self.repository.commit(name, build, urgent=True)

    def download(self, name: str, target: Path) -> None:
        path = self._path(name)
        found = self._found(self.repository.refresh(), path)
        self.repository.fetch(found, path, found.sha256, target, self._what(path))

    def names(self, prefix: str = "") -> Iterator[str]:
        return (listed.name for listed in self.listing(prefix))

    def delete(self, name: str) -> None:
        path = self._path(name)

        def build(files: Files) -> list[Operation]:
            return [CommitOperationDelete(path)] if path in files else []

        self.repository.commit(f"delete {name}", build, urgent=True)

    # --- what a remote store can do besides ----------------------------------------------

    def listing(self, prefix: str = "") -> Iterator[Listed]:
        folder = self._prefix + (f"{check_name(prefix)}/" if prefix else "")
        for path, file in self.repository.refresh().items():
            if path.startswith(folder) and path not in _HIDDEN:
                yield Listed(path.removeprefix(self._prefix), file.size)

    def commit(self, batch: Batch) -> None:
        everything = {**batch.blobs, **batch.writes, **batch.last}
        if batch.lease is not None:
            everything[batch.lease[0]] = batch.lease[1]
        if batch.marker is not None:
            everything[batch.marker[0]] = batch.marker[1]
        adds = {
            self._path(name): CommitOperationAdd(self._path(name), data)
            for name, data in everything.items()
        }

        def build(_: Files) -> list[Operation]:
            batch.check()
            # The check has looked again.
            files = self.repository.files
            if batch.lease is not None:
                self.repository.require_ours(files, self._path(batch.lease[0]))
            if batch.marker is not None and self._path(batch.marker[0]) in files:
                raise NameTaken(f"{self._what(self._path(batch.marker[0]))} is already stored")
            gone = {self._path(name) for name in batch.deletes} & files.keys() - adds.keys()
            return [*adds.values(), *(CommitOperationDelete(path) for path in sorted(gone))]

        if batch.lease is not None:
            self.repository.begin(self._path(batch.lease[0]), batch.lease[1])
        self.repository.commit(batch.message, build, urgent=batch.urgent)
        if batch.lease is not None:
            self.repository.remember(self._path(batch.lease[0]), batch.lease[1])

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        files = self.repository.refresh()

        def bring(file: Wanted) -> None:
            path = self._path(file.name)
            found = self._found(files, path)
            if found.size != file.size:
                raise DamagedError(
                    f"{self._what(path)} is {found.size:,} bytes, manifest says {file.size:,}"
                )
            self.repository.fetch(found, path, file.sha256, file.target, self._what(path))

        all_of(bring, wanted)

    def task_finished(self, card: str) -> None:
        """Show the card of the newest finished task at the top; squash the history if asked to.

        A README that a person wrote stays.
        """
        files = self.repository.refresh()
        theirs = CARD in files and not is_ours(
            self.repository.read(files[CARD], CARD).decode(errors="replace")
        )
        if card and not theirs:
            add = CommitOperationAdd(CARD, card.encode())
            self.repository.commit("model card", lambda _: [add], urgent=True)
        if self.repository.is_squashed:
            self.repository.squash()

    def _path(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _found(self, files: Files, path: str) -> HubFile:
        if path not in files or path in _HIDDEN:
            raise NameMissing(f"{self._what(path)}: nothing is stored there")
        return files[path]

    def _what(self, path: str) -> str:
        return f"{self.repository.where}: {path}"


def _refuse_below(files: Files, path: str) -> None:
    """A git tree has no place for a name below a name."""
    folders = path.split("/")
    above = ("/".join(folders[:count]) for count in range(1, len(folders)))
    taken = next((name for name in above if name in files), None)
    if taken or any(name.startswith(f"{path}/") for name in files):
        raise StoreError(f"{path}: {taken or path} is both a name and a folder there")
