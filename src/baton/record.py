"""The JSON that baton promises to others: plan, leg, checkpoint manifest and eval record.

Every record carries `schema`; a reader that meets a higher number refuses it rather than
guess. `notice` is the first field so that it is the first line: it says, for instance, that
a run used random weights.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from baton.config.decode import decode, encode
from baton.errors import ConfigError, DamagedError, NewerSchemaError

SCHEMA = 1

T = TypeVar("T", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A dataclass that is kept as one JSON object."""

    notice: str = ""
    schema: int = SCHEMA

    def to_json(self) -> bytes:
        """Indented UTF-8 with a final newline, keys in the order of the fields."""
        return dump_json(encode(self))

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> Self:
        """Decode a record; `where` is what an error calls it. Raises `DamagedError` or
        `NewerSchemaError`."""
        try:
            values = json.loads(data)
        except ValueError as error:
            raise DamagedError(f"{where}: not JSON ({error}); it was damaged or cut off") from None
        found = values.get("schema") if isinstance(values, dict) else None
        if isinstance(found, int) and found > SCHEMA:
            raise NewerSchemaError(
                f"{where}: written by a newer baton (schema {found}, this one knows {SCHEMA});"
                " upgrade baton to read it"
            )
        try:
            return decode(cls, values, where=where)
        except ConfigError as error:
            raise DamagedError(str(error)) from error


def dump_json(value: Any) -> bytes:
    """JSON the way every file of ours is written: stable, readable, strict (no NaN)."""
    return (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """One point of the matrix: its name, its labels per axis, its whole configuration."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """An experiment, expanded and frozen.

    `digest` identifies what is to be computed: pipeline, configurations and the fingerprints
    of local input files. `pins` holds what was looked up once, at the first submission (the
    commit behind a revision), so that every later leg uses the same. `split` names stages that
    get a job of their own where there is a queue; a later submission may say otherwise.
    """

    experiment: str
    pipeline: str
    digest: str
    tasks: list[TaskPlan]
    fingerprints: dict[str, str] = field(default_factory=dict)
    pins: dict[str, str] = field(default_factory=dict)
    split: list[str] = field(default_factory=list)
    created: str
    baton_version: str

    def task(self, name: str) -> TaskPlan:
        """The task of this name. Raises `ConfigError` with the names there are."""
        for task in self.tasks:
            if task.name == name:
                return task
        names = ", ".join(task.name for task in self.tasks)
        raise ConfigError(f"no task {name!r} in {self.experiment}/{self.digest}; it has: {names}")


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Which process works on a leg, precisely enough to tell whether it still lives."""

    host: str
    pid: int
    started_ticks: int
    boot: str
    pid_namespace: str

    def is_visible_from(self, here: Runner) -> bool:
        """Does this process's number mean anything to the process `here`?"""
        return (self.boot, self.pid_namespace) == (here.boot, here.pid_namespace)


LegState = Literal["active", "finished", "handed_over", "failed", "lost", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class LegRecord(Record):
    """Who worked, where, from step, to step, and why it ended.

    `position` is what was durable when the leg started, `position_at_end` when it ended: two
    equal positions mean that the leg left nothing behind. `submission` groups the legs that
    one submission (or one Slurm job) started. `durable_step` is in the store, `to_step` was
    reached; `not_stored` says what the grace was too short to send.
    """

    task: str
    number: int
    state: LegState
    submission: str = ""
    runner: Runner
    processes: int = 1
    started: str
    ended: str | None = None
    stage: str = ""
    from_step: int | None = None
    to_step: int | None = None
    durable_step: int | None = None
    not_stored: list[str] = field(default_factory=list)
    position: list[int]
    position_at_end: list[int] | None = None
    exit_status: int | None = None
    reason: str = ""
    signal: str = ""
    signal_to_durable_seconds: float | None = None
    training_seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """What a complete checkpoint consists of; written last, never changed."""

    step: int
    leg: int
    created: str
    files: list[FileEntry]


@dataclass(frozen=True, kw_only=True)
class FileList(Record):
    """Which large finished files of a task a remote store keeps under their content's name."""

    files: list[FileEntry]


@dataclass(frozen=True, kw_only=True)
class ScoreEntry:
    """A score with its tokenizer, convention and 95 % bootstrap interval."""

    column: str
    name: str
    tokenizer: str
    library: str
    convention: str
    scale: float
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generation, for people to read."""

    prompt: str
    reference: str
    prediction: str


@dataclass(frozen=True, kw_only=True)
class TrainingFigures:
    """What training took, over all legs. `None` is unknown or not applicable, never zero."""

    started: str
    ended: str
    legs: int
    seconds: float
    steps: int
    best_step: int
    dev_loss: float | None
    samples: int
    tokens: int
    labelled_tokens: int
    samples_per_s: float
    tokens_per_s: float
    peak_gpu_memory_bytes: int | None
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class GenerationFigures:
    """What evaluation took: seconds are spent in generation alone, over all legs."""

    seconds: float
    samples: int
    new_tokens: int
    samples_per_s: float
    new_tokens_per_s: float
    decoding: str
    max_new_tokens: int
    batch_size: int
    peak_gpu_memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class EvalRecord(Record):
    """What one task found: scores, cost, curve, samples, configuration and versions.

    `scores` and `samples` depend on the plan alone; `training`, `generation` and
    `environment` are measurements of the machine. `loss_curve` rows are
    `[step, train loss]`, `dev_curve` rows `[step, dev loss]`; `dev_scores` has rows
    `[step, score]` for each score that was taken with the dev loss, by its name.
    """

    experiment: str
    digest: str
    task: str
    pipeline: str
    labels: dict[str, str]
    model: dict[str, str]
    data: dict[str, Any]
    scores: list[ScoreEntry]
    training: TrainingFigures
    generation: GenerationFigures
    loss_curve: list[list[float]]
    dev_curve: list[list[float]]
    samples: list[Sample]
    dev_scores: dict[str, list[list[float]]] = field(default_factory=dict)
    config: dict[str, Any]
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PerSample(Record):
    """Scores of each test row, so that two tasks can be compared row by row.

    `scores` maps a score's column to one value a row; `bleu_statistics` holds per row what
    corpus BLEU is summed from. `rows` names the rows: tasks are comparable where they agree.
    """

    rows: list[int]
    scores: dict[str, list[float]]
    bleu_statistics: list[list[int]]


def replace(record: T, **changes: Any) -> T:
    """A copy of a record with some fields changed."""
    return dataclasses.replace(record, **changes)
