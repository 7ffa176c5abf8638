"""What EXP, --set, --site and --store mean together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

from baton.errors import BatonError, ConfigError

if TYPE_CHECKING:
    from baton.config.site import Site
    from baton.launchers.base import Drill, Request
    from baton.place import Place
    from baton.record import Plan
    from baton.status import TaskStatus
    from baton.store.patience import Patience


@dataclass(frozen=True, kw_only=True)
class Target:
    """The plan of an experiment, the tasks of it that are meant, and where they live and run."""

    plan: Plan
    tasks: list[str]
    site_name: str
    place: Place

    @property
    def root(self) -> Path:
        """The folder that tasks are worked on in."""
        return self.place.root

    @classmethod
    def fresh(cls, exp: str, settings: Sequence[str], site: str, store: str | None) -> Target:
        """The plan as the experiment's file is now."""
        plan, tasks = plan_of(exp, settings)
        return cls(plan=plan, tasks=tasks, site_name=site, place=open_place(site, store))

    @classmethod
    def submitted(cls, exp: str, settings: Sequence[str], site: str, store: str | None) -> Target:
        """The plan as it was frozen at its submission, if it was; EXP may be that plan.json."""
        from baton.frozen import path_of, read

        if exp.endswith(".json"):
            return cls.frozen(exp, settings, site, store)
        fresh = cls.fresh(exp, settings, site, store)
        fresh.refresh()
        path = path_of(fresh.root, fresh.plan)
        if path.exists():
            return cls(plan=read(path), tasks=fresh.tasks, site_name=site, place=fresh.place)
        name = fresh.plan.experiment
        others = fresh.place.versions(name)
        there = f"; there are runs of other versions: {', '.join(others)}" if others else ""
        click.echo(
            f"note: {name} as it is now ({fresh.plan.digest}) was not submitted to"
            f" {fresh.place.url}{there}",
            err=True,
        )
        return fresh

    @classmethod
    def frozen(
        cls,
        plan_or_exp: str,
        settings: Sequence[str],
        site: str,
        store: str | None,
        patience: Patience | None = None,
    ) -> Target:
        """The frozen plan that PLAN names, in the store it lies in; an experiment is frozen now."""
        from baton.frozen import read, root_of
        from baton.place import Place

        path, place = Path(plan_or_exp), None
        if path.suffix != ".json":
            fresh, _ = plan_of(plan_or_exp, settings)
            place = open_place(site, store, patience)
            path = place.freeze(fresh)
        elif not path.exists() and store is not None:
            place = open_place(site, store, patience)
            path = place.find_plan(plan_or_exp)
        plan = read(path)
        if place is None:
            here = store is None
            place = (
                Place.open(str(root_of(path, plan))) if here else open_place(site, store, patience)
            )
            place.keep(plan)
        return cls(plan=plan, tasks=[task.name for task in plan.tasks], site_name=site, place=place)

    def refresh(self, tasks: Sequence[str] | None = None) -> None:
        """Bring what a remote store knows of the tasks that are not at work here."""
        self.place.refresh(self.plan, self.tasks if tasks is None else tasks)

    @cached_property
    def site(self) -> Site:
        """The site's file, read when it is first asked for."""
        from baton.config.site import load_site

        return load_site(self.site_name)

    def one_task(self, command: str) -> str:
        """The one task that is meant. Raises `ConfigError` if there are several."""
        if len(self.tasks) != 1:
            raise ConfigError(
                f"{command} is about one task; {self.plan.experiment} has: {', '.join(self.tasks)}"
            )
        return self.tasks[0]

    def request(self, tasks: Sequence[str], drills: Sequence[Drill] = ()) -> Request:
        """What a launcher is asked about these tasks."""
        from baton.frozen import path_of
        from baton.launchers.base import Request

        path = path_of(self.root, self.plan)
        return Request(
            plan=self.plan,
            plan_path=path,
            store_root=self.root,
            store_url=self.place.url,
            tasks=tasks,
            drills=drills,
        )

    def recorded(self, tasks: Sequence[str] | None = None) -> list[TaskStatus]:
        """Where the tasks stand as far as the records know."""
        from baton.pipelines import PIPELINES
        from baton.status import status_of

        stages = PIPELINES[self.plan.pipeline]().stage_names
        names = self.tasks if tasks is None else tasks
        return [status_of(self.root, self.plan, stages, task) for task in names]

    def look(self) -> list[TaskStatus]:
        """Where the tasks stand, with what the site's scheduler knows."""
        from baton.launchers.choose import launcher_for

        return launcher_for(self.site).look(self.request(self.tasks), self.recorded())

    def statuses(self) -> list[TaskStatus]:
        """As `look`, but a scheduler that is out of reach is no reason to show nothing."""
        try:
            return self.look()
        except BatonError as error:
            click.echo(f"note: only what the records say; {error}", err=True)
            return self.recorded()


def plan_of(exp: str, settings: Sequence[str]) -> tuple[Plan, list[str]]:
    """The plan of what `exp` names, and the tasks of it that are meant."""
    from baton.legs import utc_now
    from baton.plan import build_plan, select

    selection = select(exp, settings)
    plan = build_plan(selection.experiment, created=utc_now())
    names = [task.name for task in plan.tasks]
    return plan, [selection.task] if selection.task else names


def open_place(site: str, store: str | None, patience: Patience | None = None) -> Place:
    """A site's store, or the store that `--store` names."""
    from baton.config.site import load_site
    from baton.place import Place
    from baton.store.patience import IMPATIENT

    return Place.open(load_site(site).store if store is None else store, patience or IMPATIENT)
