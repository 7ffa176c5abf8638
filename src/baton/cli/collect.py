"""`baton collect`: what an experiment found."""

from __future__ import annotations

from pathlib import Path

import click

from baton.cli.options import JSON, SET, SITE, STORE
from baton.cli.target import Target


@click.command()
@click.argument("exp")
@SET
@SITE
@STORE
@click.option("--out", type=click.Path(path_type=Path), help="Default: results/EXPERIMENT.")
@JSON
def collect(
    exp: str,
    settings: tuple[str, ...],
    site: str,
    store: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write the table, the plots and report.html, and say what is missing."""
    from baton.collect import collect as gather
    from baton.store.local import LocalStore

    target = Target.submitted(exp, settings, site, store)
    plan = target.plan
    target.refresh([task.name for task in plan.tasks])
    states = {s.task: s.state for s in target.recorded([task.name for task in plan.tasks])}
    place = LocalStore(target.root / plan.experiment / plan.digest)
    folder = out or Path("results") / plan.experiment
    collected = gather(place, plan, folder, states=states)
    if as_json:
        click.echo(collected.to_json().decode(), nl=False)
        return
    from baton.console import print_table, results_table

    if collected.notice:
        click.echo(collected.notice)
    print_table(results_table(collected.rows))
    for task, reason in collected.missing.items():
        click.echo(f"missing: {task}: {reason}")
    for name, reason in collected.not_drawn.items():
        click.echo(f"not drawn: {name}: {reason}")
    for path in collected.files:
        click.echo(f"wrote {path}")
