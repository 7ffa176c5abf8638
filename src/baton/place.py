"""A store as commands use it: work is done in a folder, which may be a copy of a remote store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton import frozen
from baton.errors import ConfigError, NameMissing, NameTaken
from baton.pipelines import PIPELINES
from baton.record import Plan, dump_json
from baton.runner import task_store
from baton.store.base import Remote, check_name
from baton.store.local import LocalStore
from baton.store.mirror import Mirror
from baton.store.open import is_remote, local_folder, open_remote
from baton.store.patience import IMPATIENT, Patience
from baton.store.task_names import CANCELLED


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the plans and tasks of a command live.

    Attributes:
        url: what to give to `--store` to mean the same place, also from elsewhere.
        root: the folder on this machine.
        remote: the store that the folder copies; None if the folder is the store.
    """

    url: str
    root: Path
    remote: Remote | None = None

    @classmethod
    def open(cls, url: str, patience: Patience = IMPATIENT) -> Place:
        """Raises `ConfigError` or `StoreRefused` when there is no such place."""
        root = local_folder(url)
        if not is_remote(url):
            return cls(url=str(root), root=root)
        return cls(url=url, root=root, remote=open_remote(url, patience))

    def mirror(self, plan: Plan, task: str) -> Mirror | None:
        """The two sides of a task; None if the folder is the store."""
        if self.remote is None:
            return None
        version = self.remote.below(f"{plan.experiment}/{plan.digest}")
        return Mirror(task_store(self.root, plan, task), version, task)

    def freeze(self, plan: Plan) -> Path:
        """Write a plan unless it is there; the first one stored is everybody's.

        Raises:
            ModelError, DataError: a hub is out of reach, or has no such thing.
        """
        if self.remote is None:
            return frozen.freeze(plan, self.root)
        self._bring_plan(plan)
        path = frozen.freeze(plan, self.root)
        with contextlib.suppress(NameTaken):
            self.remote.write(self._plan_name(plan), path.read_bytes(), exclusive=True)
            return path
        self._bring_plan(plan)
        return path

    def keep(self, plan: Plan) -> None:
        """Store a frozen plan that lies elsewhere, so that other machines find it."""
        if self.remote is not None:
            with contextlib.suppress(NameTaken):
                self.remote.write(self._plan_name(plan), plan.to_json(), exclusive=True)

    def refresh(self, plan: Plan, tasks: Sequence[str]) -> None:
        """Bring the plan, and the records of tasks that are not at work here, for people to see."""
        if self.remote is None:
            return
        self._bring_plan(plan)
        if not frozen.path_of(self.root, plan).exists():
            return
        stages = PIPELINES[plan.pipeline]().stage_names
        for task in tasks:
            mirror = self.mirror(plan, task)
            if mirror is not None:
                mirror.refresh(stages)

    def bring(self, plan: Plan, task: str, *, checkpoints: int | None = None) -> None:
        """Bring what the store has of a task, with its newest `checkpoints` (0: all of them).

        Nothing beneath a leg that is at work here: it has brought, or made, all there is.
        """
        mirror = self.mirror(plan, task)
        if mirror is None:
            return
        with mirror.hold() as is_held:
            if is_held:
                mirror.pull(PIPELINES[plan.pipeline]().stage_names)
                if checkpoints is not None:
                    mirror.bring_checkpoints(checkpoints)

    def find_plan(self, name: str) -> Path:
        """A frozen plan by its name in this store, `EXPERIMENT/DIGEST/plan.json`, brought here.

        Its path will do, too: as a machine calls it whose copy of the store lies at this place.

        Raises:
            ConfigError: there is none of this name.
        """
        if Path(name).is_relative_to(self.root):
            name = Path(name).relative_to(self.root).as_posix()
        path = self.root / check_name(name)
        if self.remote is not None:
            with contextlib.suppress(NameMissing):
                LocalStore(path.parent).write(frozen.FILE, self.remote.read(name))
        if not path.exists():
            raise ConfigError(f"there is no plan {name}, neither here nor in {self.url}")
        return path

    def versions(self, experiment: str) -> list[str]:
        """Digests of every plan of an experiment."""
        if self.remote is None:
            return frozen.versions(self.root, experiment)
        parts = [name.split("/") for name in self.remote.names(experiment)]
        return sorted({part[-2] for part in parts if part[-1] == frozen.FILE})

    def mark_cancelled(self, plan: Plan, tasks: Sequence[str], time: str) -> None:
        """Let other machines know that these tasks are not to be started."""
        for task in tasks:
            if (mirror := self.mirror(plan, task)) is not None:
                mirror.remote.write(CANCELLED, dump_json({"time": time}))

    def take_up_again(self, plan: Plan, tasks: Sequence[str]) -> None:
        """Forget that these tasks were cancelled."""
        for task in tasks:
            if (mirror := self.mirror(plan, task)) is not None:
                mirror.remote.delete(CANCELLED)

    def _plan_name(self, plan: Plan) -> str:
        return f"{plan.experiment}/{plan.digest}/{frozen.FILE}"

    def _bring_plan(self, plan: Plan) -> None:
        assert self.remote is not None
        with contextlib.suppress(NameMissing):
            data = self.remote.read(self._plan_name(plan))
            path = frozen.path_of(self.root, plan)
            if not path.exists() or path.read_bytes() != data:
                LocalStore(path.parent).write(frozen.FILE, data)
