"""`baton export`: a trained model for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from baton.cli.options import SET, SITE, STORE
from baton.cli.target import Target


@click.command()
@click.argument("task")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="A new folder, or FILE.zip."
)
@SET
@SITE
@STORE
def export(task: str, out: Path, settings: tuple[str, ...], site: str, store: str | None) -> None:
    """Copy a task's final model: the best adapter or weights, tokenizer, configuration."""
    from baton.export import export as copy_out
    from baton.runner import task_store

    target = Target.submitted(task, settings, site, store)
    name = target.one_task("export")
    target.place.bring(target.plan, name)
    files = copy_out(
        task_store(target.root, target.plan, name), out, task=f"{target.plan.experiment}/{name}"
    )
    click.echo(f"wrote {out}: {', '.join(files)}")
