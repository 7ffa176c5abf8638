"""`baton export`: a trained model for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from baton.cli.options import SET, SITE, STORE
from baton.cli.target import Target


@click.command()
@click.argument("task")
@click.option("--out", required=True, help="A new folder, FILE.zip, or hf://user/repository.")
@SET
@SITE
@STORE
def export(task: str, out: str, settings: tuple[str, ...], site: str, store: str | None) -> None:
    """Copy a task's final model: the best adapter or weights, tokenizer, configuration."""
    from baton.export import export as copy_out
    from baton.export import export_to_hub
    from baton.pipelines import PIPELINES
    from baton.runner import task_store

    target = Target.submitted(task, settings, site, store)
    name = target.one_task("export")
    target.place.bring(target.plan, name)
    place = task_store(target.root, target.plan, name)
    about: Any = {
        "task": f"{target.plan.experiment}/{name}",
        "stages": PIPELINES[target.plan.pipeline]().training_stages,
    }
    if out.startswith("hf://"):
        files = export_to_hub(place, out, **about)
    else:
        files = copy_out(place, Path(out), **about)
    click.echo(f"wrote {out}: {', '.join(files)}")
