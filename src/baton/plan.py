"""From an experiment's name to its frozen plan: find, expand, check, digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baton
from baton.config.decode import decode, encode
from baton.config.experiment import Experiment, apply_set, available, nearest
from baton.config.home import find_file, jobs_folder
from baton.config.yaml import load_yaml
from baton.errors import ConfigError
from baton.pins import look_up, pins_of
from baton.pipelines import PIPELINES, Pipeline
from baton.record import Plan, TaskPlan, replace
from baton.train.config import RANDOM_NOTICE

# Keys of a task's `data` that name local files.
_FILE_KEYS = ("path", "valid", "format", "stage1", "stage2", "stage3", "test")
# Files up to this size are hashed whole; of larger ones, evenly spaced pieces.
_WHOLE_BYTES = 64 * 2**20
_PIECES, _PIECE_BYTES = 16, 2**20


@dataclass(frozen=True)
class Selection:
    """What a person named on the command line: an experiment, and perhaps one task of it."""

    experiment: Experiment
    task: str | None


def select(name: str, settings: Sequence[str] = ()) -> Selection:
    """Find what `name` means: an experiment or a file, one task of it (`…/task`), or a task.

    A bare task name is looked for in `jobs/*.yaml`, not in `jobs/smoke`, whose tasks have the
    same names.

    Raises:
        ConfigError: nothing, or more than one thing, has this name; the nearest are given.
    """
    by_path = re.fullmatch(r"(.+\.ya?ml)(?:/([^/]+))?", name)
    if by_path:
        path = Path(by_path[1])
        found = _read(_name_of(path), path, settings)
        return Selection(found, _task_of(found, by_path[2]) if by_path[2] else None)
    folder = jobs_folder()
    names = available(folder)
    if name in names:
        return Selection(_read(name, folder / f"{name}.yaml", settings), None)
    experiment, _, task = name.rpartition("/")
    if experiment in names:
        found = _read(experiment, folder / f"{experiment}.yaml", settings)
        return Selection(found, _task_of(found, task))
    tasks = {
        other: [point.name for point in _read(other, folder / f"{other}.yaml", settings).points()]
        for other in names
        if "/" not in other
    }
    homes = [other for other in tasks if name in tasks[other]]
    if len(homes) > 1:
        choices = " or ".join(f"{home}/{name}" for home in homes)
        raise ConfigError(f"{name!r} is a task of several experiments; say {choices}")
    if homes:
        return Selection(_read(homes[0], folder / f"{homes[0]}.yaml", settings), name)
    known = [*names, *(task for several in tasks.values() for task in several)]
    raise ConfigError(f"no experiment or task {name!r} below {folder}; {nearest(name, known)}")


def build_plan(experiment: Experiment, *, created: str) -> Plan:
    """Expand the matrix, decode every task's configuration and freeze it all.

    Raises:
        ConfigError: every problem of the file at once.
    """
    pipeline = pipeline_of(experiment)
    tasks: list[TaskPlan] = []
    problems: dict[str, None] = {}
    split: list[str] = []
    try:
        split = experiment.split(pipeline.stage_names)
    except ConfigError as error:
        problems |= dict.fromkeys(error.problems)
    for point in experiment.points():
        try:
            config = decode(pipeline.config, point.document.data, document=point.document)
        except ConfigError as error:
            # The same mistake in every task of a matrix is one mistake.
            problems |= dict.fromkeys(error.problems)
        else:
            tasks.append(TaskPlan(name=point.name, labels=point.labels, config=encode(config)))
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    place = experiment.document.place(("matrix",))
    problems |= {f"{place}: matrix: two tasks would be called {name!r}": None for name in twice}
    if problems:
        raise ConfigError(list(problems))
    fingerprints = {
        path: fingerprint(path, experiment.document.place(("data", key)), key=key)
        for path, key in _local_files(tasks).items()
    }
    identity = {
        "pipeline": pipeline.name,
        "tasks": [encode(task) for task in tasks],
        "fingerprints": fingerprints,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Plan(
        notice=_notice(tasks),
        experiment=experiment.name,
        pipeline=pipeline.name,
        digest=digest,
        tasks=tasks,
        fingerprints=fingerprints,
        split=split,
        created=created,
        baton_version=baton.__version__,
    )


def pin(plan: Plan) -> Plan:
    """The plan with the commits behind its Hub revisions.

    Raises:
        ModelError, DataError: the Hub is out of reach, or has no such thing.
    """
    config_class = PIPELINES[plan.pipeline]().config
    found = {pinned for task in plan.tasks for pinned in pins_of(decode(config_class, task.config))}
    pins = {
        f"{kind}:{name}@{revision}": look_up(kind, name, revision)
        for kind, name, revision in sorted(found)
    }
    return replace(plan, pins=pins)


def pipeline_of(experiment: Experiment) -> Pipeline:
    """The pipeline that an experiment names. Raises `ConfigError`."""
    if experiment.pipeline not in PIPELINES:
        place = experiment.document.place(("pipeline",))
        advice = nearest(experiment.pipeline, list(PIPELINES))
        raise ConfigError(f"{place}: pipeline: no pipeline {experiment.pipeline!r}; {advice}")
    return PIPELINES[experiment.pipeline]()


def fingerprint(path: str, where: str = "", *, key: str = "path") -> str:
    """Identity of a local input file, cheap enough for `status`: SHA-256 over size and bytes.

    Of a file over 64 MiB only sixteen evenly spaced MiB are read. `where` is the line that
    names the file, as `data.<key>`.

    Raises:
        ConfigError: there is no such file.
    """
    place = f"{where}: data.{key}" if where else f"data.{key}"
    found = find_file(path)
    try:
        size = found.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(found, "rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
            else:
                for piece in range(_PIECES):
                    file.seek(piece * (size - _PIECE_BYTES) // (_PIECES - 1))
                    digest.update(file.read(_PIECE_BYTES))
    except FileNotFoundError:
        raise ConfigError(
            f"{place}: there is no file {path} (looked for from {Path.cwd()})"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{place}: {path} is a folder; name a file") from None
    return digest.hexdigest()[:16]


def _notice(tasks: Sequence[TaskPlan]) -> str:
    """What every record of the plan says first; nothing where only some tasks need it."""
    sources = {str(task.config.get("model", {}).get("source")) for task in tasks}
    return RANDOM_NOTICE if sources == {"random"} else ""


def files_of(task: TaskPlan) -> dict[str, str]:
    """Every file that a task's `data` names, with the key that names it."""
    data: Any = task.config.get("data")
    named = {key: data.get(key) for key in _FILE_KEYS} if isinstance(data, dict) else {}
    # A format is a name of ours, or a file of the user's.
    if not str(named.get("format")).endswith((".yaml", ".yml")):
        named.pop("format", None)
    return {path: key for key, path in named.items() if isinstance(path, str)}


def _local_files(tasks: Sequence[TaskPlan]) -> dict[str, str]:
    return {path: key for task in reversed(tasks) for path, key in files_of(task).items()}


def _name_of(path: Path) -> str:
    """A file below `jobs/` is the experiment of that name, however it was written."""
    try:
        inside = path.resolve().relative_to(jobs_folder().resolve())
    except (ValueError, ConfigError):
        return path.stem
    return inside.with_suffix("").as_posix()


def _read(name: str, path: Path, settings: Sequence[str]) -> Experiment:
    return Experiment.read(name, apply_set(load_yaml(path), settings))


def _task_of(experiment: Experiment, task: str) -> str:
    names = [point.name for point in experiment.points()]
    if task not in names:
        raise ConfigError(f"{experiment.name} has no task {task!r}; {nearest(task, names)}")
    return task
