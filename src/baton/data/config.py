"""What an experiment says about its question-answer data (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from baton.config.decode import Count, at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from, which are kept, and how they are split.

    Exactly one of `path` (a local file) and `hub` (a Hub data set) is given. `files` names
    files inside the data set; without it the data set's own `train` split is loaded. `rows`
    is the size of the training subset; None takes all there are.
    """

    path: str | None = None
    hub: str | None = None
    revision: str = "main"
    files: list[str] = field(default_factory=list)
    subset: str | None = None
    format: str | None = None
    encoding: str | None = None
    columns: dict[str, str | list[str]] = field(
        default_factory=lambda: {"question": ["instruction", "input"], "answer": "output"}
    )
    min_chars: Annotated[int, at_least(0)] = 5
    max_chars: Annotated[int, at_least(1)] = 1024
    rows: Annotated[Count, at_least(1)] | None = None
    pool_rows: Annotated[Count, at_least(1)] | None = None
    dev_rows: Annotated[Count, at_least(1)] | None = None
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 42
    system: str | None = None
    max_length: Annotated[int, at_least(8)] = 512

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise ValueError(
                f"give either path or hub, got path={self.path!r} and hub={self.hub!r}"
            )
        if self.min_chars > self.max_chars:
            raise ValueError(
                f"min_chars must not exceed max_chars ({self.max_chars}), got {self.min_chars}"
            )
        missing = {"question", "answer"} - self.columns.keys()
        extra = self.columns.keys() - {"question", "answer"}
        if missing or extra:
            raise ValueError(
                f"columns must map question and answer to columns of the file, got"
                f" {sorted(self.columns)}"
            )
        if abs(sum(self.shares) - 1) > 1e-9 or min(self.shares) <= 0:
            raise ValueError(
                f"shares must be three positive parts of 1 (train, dev, test), got"
                f" {list(self.shares)}"
            )

    @property
    def pin_key(self) -> str:
        """Under which name a plan keeps the commit of this data set; empty for a local file."""
        return f"dataset:{self.hub}@{self.revision}" if self.hub else ""
