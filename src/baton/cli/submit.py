"""`baton submit`: run what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from baton.cli.experiment import LEFT_ALONE
from baton.cli.options import SET, SITE, STORE
from baton.cli.target import Target
from baton.errors import ConfigError, ExitStatus

if TYPE_CHECKING:
    from baton.record import Plan

_AT_MOST_NAMED = 10


@click.command()
@click.argument("exp")
@SET
@SITE
@STORE
@click.option("--dry-run", is_flag=True, help="Show exactly what would run, and run nothing.")
@click.option("--max-parallel", type=click.IntRange(1), help="Tasks at once.")
@click.option("--detach", is_flag=True, help="Leave it running and return.")
@click.option(
    "--drill",
    "drills",
    metavar="TASK=SIGNAL@STEP",
    multiple=True,
    help="Fire drill: send TERM, KILL, … to a task at a step; may be repeated.",
)
def submit(
    exp: str,
    settings: tuple[str, ...],
    site: str,
    store: str | None,
    dry_run: bool,
    max_parallel: int | None,
    detach: bool,
    drills: tuple[str, ...],
) -> None:
    """Run what is missing of an experiment or task, through every handover."""
    from baton.frozen import path_of, read
    from baton.handover import StopSignal
    from baton.launchers.base import Drill
    from baton.launchers.choose import launcher_for
    from baton.record import replace

    target = Target.fresh(exp, settings, site, store)
    tasks, plan, root = target.tasks, target.plan, target.root
    parsed = [Drill.parse(text) for text in drills]
    unknown = [drill.task for drill in parsed if drill.task not in tasks]
    if unknown:
        raise ConfigError(
            f"--drill {unknown[0]}: not a task of this submission: {', '.join(tasks)}"
        )
    stop = StopSignal()
    launcher = launcher_for(target.site, stop=stop, max_parallel=max_parallel)
    target.refresh()
    states = {s.task: s.state for s in (target.statuses() if dry_run else target.look())}
    waiting = [task for task in tasks if states[task] not in LEFT_ALONE]
    at_work = [task for task in tasks if states[task] in ("running", "pending")]
    if dry_run:
        path = path_of(root, plan)
        click.echo(f"would write {path}" if not path.exists() else f"plan {path}")
        for task in tasks:
            if task not in waiting:
                click.echo(f"would skip: {task} is {states[task]}")
        click.echo(launcher.preview(target.request(waiting)))
        return
    path = target.place.freeze(plan)
    target.place.take_up_again(plan, waiting)
    if detach and launcher.waits:
        _detach(plan, root)
        return
    click.echo(f"{plan.experiment}/{plan.digest}: {len(waiting)} of {len(tasks)} tasks to run")
    for task in at_work[:_AT_MOST_NAMED]:
        click.echo(f"{task}: {states[task]} already, left alone")
    if at_work[_AT_MOST_NAMED:]:
        click.echo(f"and {len(at_work) - _AT_MOST_NAMED} more, left alone")
    from baton.console import view

    # How stages share jobs is no part of what is computed: it may change at every submission.
    submitted = replace(read(path), split=plan.split)
    frozen = Target(plan=submitted, tasks=tasks, site_name=site, place=target.place)
    if launcher.waits:
        stop.install()
    with view() as shown:
        ended = launcher.submit(frozen.request(waiting, parsed), shown)
    if launcher.waits:
        ended |= dict.fromkeys(at_work, ExitStatus.HANDED_OVER)
    _finish(ended)


def _detach(plan: Plan, root: Path) -> None:
    """Start the same command again in a session of its own, and leave."""
    folder = root / plan.experiment / plan.digest
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for word in sys.argv[1:] if word != "--detach"]
    with open(folder / "launcher.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    click.echo(
        f"left running as process {process.pid}, log in {folder / 'launcher.log'};"
        f" look with: baton status {plan.experiment}"
    )


def _finish(ended: dict[str, ExitStatus]) -> None:
    """Exit with the worst of what the tasks ended with."""
    order = (ExitStatus.STOP, ExitStatus.FAILED, ExitStatus.HANDED_OVER)
    for status in order:
        tasks = [task for task, how in ended.items() if how == status]
        if tasks:
            word = {75: "handed over", 78: "stopped"}.get(status, "failed")
            click.echo(f"{word}: {', '.join(tasks)}", err=True)
    sys.exit(next((s for s in order if s in ended.values()), ExitStatus.FINISHED))
