"""Tasks at work: `baton status`, `logs`, `cancel`."""

from __future__ import annotations

import codecs
import json
import time

import click

from baton.cli.options import JSON, SET, SITE, STORE
from baton.cli.target import Target
from baton.errors import ConfigError

# Of a task in one of these states more may come.
_GOING_ON = ("running", "unattended", "pending", "handed over", "stage done", "lost")
# A remote store is asked for news of a task less often than a folder.
_REMOTE_SECONDS = 5.0


@click.command()
@click.argument("exp")
@SET
@SITE
@STORE
@JSON
def status(
    exp: str, settings: tuple[str, ...], site: str, store: str | None, as_json: bool
) -> None:
    """Where every task stands: state, leg, step, speed, durable step, last reason."""
    target = Target.submitted(exp, settings, site, store)
    found = target.statuses()
    if as_json:
        click.echo(json.dumps([s.to_json() for s in found], indent=2))
        return
    from baton.console import job_legs_table, print_table, status_table

    print_table(status_table(target.plan, found))
    if len(found) == 1 and found[0].job_legs:
        print_table(job_legs_table(found[0].job_legs))


@click.command()
@click.argument("task")
@SET
@SITE
@STORE
@click.option("-f", "--follow", is_flag=True, help="Keep printing, across legs, until it ends.")
def logs(task: str, settings: tuple[str, ...], site: str, store: str | None, follow: bool) -> None:
    """Print the log of a task, all legs in one."""
    from baton.launchers.base import LOG
    from baton.launchers.choose import launcher_for
    from baton.runner import task_store
    from baton.status import may_speak

    target = Target.submitted(task, settings, site, store)
    name = target.one_task("logs")
    path = task_store(target.root, target.plan, name).root / LOG
    launcher = launcher_for(target.site)
    text = codecs.getincrementaldecoder("utf-8")("replace")
    looked, shown = -launcher.look_every_seconds, 0
    while True:
        if path.exists():
            with open(path, "rb") as log:
                log.seek(shown)
                more = log.read()
            shown += len(more)
            click.echo(text.decode(more), nl=False)
        if not follow:
            break
        # What the records say costs nothing; the launcher is asked now and then.
        target.refresh()
        state = target.recorded()[0].state
        if state != "running" and time.monotonic() - looked >= launcher.look_every_seconds:
            looked = time.monotonic()
            state = target.statuses()[0].state
            follow = state in _GOING_ON
        elif state in ("finished", "cancelled"):
            follow = False
        follow = follow or may_speak(target.root, target.plan, name)
        if follow:
            time.sleep(0.5 if target.place.remote is None else _REMOTE_SECONDS)
    if not shown:
        raise ConfigError(f"{name} has no log yet; it was not started here ({path})")


@click.command()
@click.argument("exp")
@SET
@SITE
@STORE
def cancel(exp: str, settings: tuple[str, ...], site: str, store: str | None) -> None:
    """Stop running tasks with their work saved; submit goes on from there."""
    from baton.console import Lines
    from baton.frozen import path_of
    from baton.launchers.choose import launcher_for
    from baton.legs import utc_now

    target = Target.submitted(exp, settings, site, store)
    name, root = target.plan.experiment, target.root
    if not path_of(root, target.plan).exists():
        raise ConfigError(f"nothing to cancel: {name} was not submitted to {target.place.url}")
    waiting = [s.task for s in target.recorded() if s.state != "finished"]
    target.place.mark_cancelled(target.plan, waiting, utc_now())
    launcher_for(target.site).cancel(target.request(waiting), Lines())
