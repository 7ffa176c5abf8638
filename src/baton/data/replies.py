"""A teacher's replies on disk: what was answered once is never asked again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.errors import StoreError
from baton.store.base import explained


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a teacher said; `is_cut` where it ran into the limit of tokens before its end."""

    text: str
    is_cut: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Replies:
    """A folder with one small JSON file a reply, named by the SHA-256 of its request.

    A file appears only when it is complete, so a kill costs at most the replies that were on
    their way. Several processes may share the folder.
    """

    folder: Path

    def get(self, request: Mapping[str, Any]) -> Reply | None:
        """The reply to exactly this request, if there is one. Raises `StoreError`."""
        path = self._path(request)
        try:
            return Reply(**json.loads(path.read_bytes())["reply"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}: not a reply of ours ({error}); remove it, and it is asked for again"
            ) from error

    def spent(self) -> Reply:
        """The tokens of all replies there are, whoever asked for them; its text is empty."""
        tokens = [0, 0]
        for path in self.folder.glob("*/[0-9a-f]*.json"):
            reply = json.loads(path.read_bytes())["reply"]
            tokens[0] += reply["prompt_tokens"]
            tokens[1] += reply["completion_tokens"]
        return Reply(text="", prompt_tokens=tokens[0], completion_tokens=tokens[1])

    def put(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keep a reply, with its request for people to look up."""
        path = self._path(request)
        beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
        text = json.dumps({"request": request, "reply": asdict(reply)}, ensure_ascii=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                # A reply may hold half a surrogate pair, which no encoding can write.
                file.write(text.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError as error:
            raise explained(error, f"writing {path}") from error

    def _path(self, request: Mapping[str, Any]) -> Path:
        canonical = json.dumps(request, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(canonical.encode("utf-8", "replace")).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"
