"""What an experiment says about its data (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from baton.config.decode import Count, at_least, between


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where rows come from: exactly one of `path` (a local file) and `hub` (a Hub data set).

    `files` names files inside the data set; without it its own `split` is loaded. `columns` maps
    fields to columns of the file; several are joined by a newline.
    """

    path: str | None = None
    hub: str | None = None
    revision: str = "main"
    files: list[str] = field(default_factory=list)
    subset: str | None = None
    split: str = "train"
    format: str | None = None
    encoding: str | None = None
    columns: dict[str, str | list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise ValueError(
                f"give either path or hub, got path={self.path!r} and hub={self.hub!r}"
            )

    @property
    def pin_key(self) -> str:
        """Under which name a plan keeps the commit of this data set; empty for a local file."""
        return f"dataset:{self.hub}@{self.revision}" if self.hub else ""

    def _require_columns(self, *fields: str) -> None:
        if self.columns.keys() != set(fields):
            raise ValueError(
                f"columns must map {' and '.join(fields)} to columns of the file, got"
                f" {sorted(self.columns)}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Which rows of question and answer are kept, and how they are split.

    `rows` is the size of the training subset; None takes all there are.
    """

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
        super().__post_init__()
        if self.min_chars > self.max_chars:
            raise ValueError(
                f"min_chars must not exceed max_chars ({self.max_chars}), got {self.min_chars}"
            )
        self._require_columns("question", "answer")
        if abs(sum(self.shares) - 1) > 1e-9 or min(self.shares) <= 0:
            raise ValueError(
                f"shares must be three positive parts of 1 (train, dev, test), got"
                f" {list(self.shares)}"
            )


@dataclass(frozen=True, kw_only=True)
class PairConfig(SourceConfig):
    """Which pairs of prompt and response are kept, held out for validation, and cut to length.

    Attributes:
        valid: a local file of validation pairs with the same columns; without it
            `valid_share` of the prompts are held out, the same ones for the same `seed`.
        valid_rows: at most so many validation pairs are used.
        rows: the first so many training pairs are used; None uses all.
        max_seq_len: tokens of a prompt, and of a response, its end token included.
    """

    columns: dict[str, str | list[str]] = field(
        default_factory=lambda: {"prompt": "prompt", "response": "response"}
    )
    valid: str | None = None
    valid_share: Annotated[float, between(0, 0.5)] = 0.01
    valid_rows: Annotated[Count, at_least(1)] | None = None
    rows: Annotated[Count, at_least(1)] | None = None
    min_chars: Annotated[int, at_least(1)] = 1
    max_chars: Annotated[int, at_least(1)] = 100_000
    seed: int = 42
    max_seq_len: Annotated[int, at_least(2)] = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_chars > self.max_chars:
            raise ValueError(
                f"min_chars must not exceed max_chars ({self.max_chars}), got {self.min_chars}"
            )
        self._require_columns("prompt", "response")
        if self.valid is None and self.valid_share == 0:
            raise ValueError("valid_share must be more than 0 where no valid file is given, got 0")
