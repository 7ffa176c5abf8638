"""What `baton generate` asks of a pipeline (no torch in here)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from baton.errors import DataError
from baton.eval.config import GenerateConfig
from baton.record import Plan, TaskPlan
from baton.store.local import LocalStore


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One thing to answer: a question, the documents it is about, and what others answered."""

    question: str
    documents: tuple[str, ...] = ()
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A task that has at least one checkpoint; `store` is its folder."""

    plan: Plan
    task: TaskPlan
    config: Any
    store: LocalStore


class Answerer(Protocol):
    """How a task answers. Making one is quick; the model is loaded by the first answer."""

    @property
    def sampling(self) -> GenerateConfig:
        """How answers are drawn unless the command line says otherwise."""
        ...

    def samples(self) -> Sequence[Ask]:
        """What to ask when the command line names nothing."""
        ...

    def read(self, path: Path) -> Sequence[Ask]:
        """What a file asks, in its order. Raises `DataError`, with every bad row."""
        ...

    def answer(
        self, ask: Ask, config: GenerateConfig, on_text: Callable[[str], None] | None = None
    ) -> str:
        """The answer; `on_text` hears it piece by piece while it is written."""
        ...


def refuse_documents(ask: Ask) -> None:
    """For pipelines whose questions stand alone. Raises `DataError`."""
    if ask.documents:
        raise DataError("this pipeline answers questions without documents; leave out --document")
