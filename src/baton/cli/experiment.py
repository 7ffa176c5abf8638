"""What an experiment is: `baton check`, `plan`, `freeze`."""

from __future__ import annotations

import click

from baton.cli.options import JSON, SET, SITE, STORE
from baton.cli.target import Target, plan_of

# What submitting does about a task that is not to be started.
LEFT_ALONE = {"finished": "skip", "running": "leave running", "pending": "leave in the queue"}


@click.command()
@click.argument("exp")
@SET
def check(exp: str, settings: tuple[str, ...]) -> None:
    """Check an experiment file: every problem at once."""
    plan, tasks = plan_of(exp, settings)
    click.echo(f"{plan.experiment}: {len(tasks)} of {len(plan.tasks)} tasks, digest {plan.digest}")


@click.command()
@click.argument("exp")
@SET
@SITE
@STORE
@JSON
def plan(exp: str, settings: tuple[str, ...], site: str, store: str | None, as_json: bool) -> None:
    """Show an experiment's tasks, its digest, and what a submit would run."""
    if as_json:
        click.echo(plan_of(exp, settings)[0].to_json().decode(), nl=False)
        return
    target = Target.fresh(exp, settings, site, store)
    meant = target.plan
    click.echo(f"{meant.experiment}  pipeline {meant.pipeline}  digest {meant.digest}")
    target.refresh()
    click.echo(f"store {target.place.url.rstrip('/')}/{meant.experiment}/{meant.digest}")
    for status in target.statuses():
        does = LEFT_ALONE.get(status.state, "run")
        click.echo(f"  {status.task}: {status.state} -> {does}")


@click.command()
@click.argument("exp")
@SET
@SITE
@STORE
def freeze(exp: str, settings: tuple[str, ...], site: str, store: str | None) -> None:
    """Write an experiment's plan; print its path and, a line each, the tasks meant by EXP."""
    target = Target.fresh(exp, settings, site, store)
    path = target.place.freeze(target.plan)
    for line in (path.absolute(), *target.tasks):
        click.echo(line)
