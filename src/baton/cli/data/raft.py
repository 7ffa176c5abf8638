"""`baton data raft`: sample rows, check a file, have a teacher write one."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from baton.errors import ExitStatus

FORMAT = click.option(
    "--format",
    "format_name",
    default="medical",
    show_default=True,
    help="medical, berkeley, or a .yaml file of your own.",
)
# Of more notes than that, the first ones and their number say enough.
_SHOWN_NOTES = 20


@click.group()
def raft() -> None:
    """Questions, documents and a teacher's answers."""


@raft.command()
@FORMAT
@click.option("--out", type=click.Path(path_type=Path), help="Default: the terminal.")
def sample(format_name: str, out: Path | None) -> None:
    """Write a small valid example."""
    from baton.pipelines.raft.sample import sample_path

    text = sample_path(format_name).read_text(encoding="utf-8")
    if out is None:
        click.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")
    click.echo(f"wrote {out}: {len(text.splitlines())} rows of the format {format_name}")


@raft.command()
@click.argument("file", type=click.Path(path_type=Path))
@FORMAT
def check(file: Path, format_name: str) -> None:
    """Name every mistake of a file of rows, with its line and field."""
    from baton.pipelines.raft.check import check as examine
    from baton.pipelines.raft.format import load_format

    findings = examine(file, load_format(format_name))
    for mistake in findings.mistakes:
        click.echo(f"error: {mistake}", err=True)
    for note in findings.notes[:_SHOWN_NOTES]:
        click.echo(f"note: {note}", err=True)
    if len(findings.notes) > _SHOWN_NOTES:
        click.echo(f"note: and {len(findings.notes) - _SHOWN_NOTES:,} more notes", err=True)
    click.echo(f"{file}: {findings.summary}")
    if findings.mistakes:
        click.echo(f"{len(findings.mistakes):,} mistakes; nothing can be trained on this file")
        sys.exit(ExitStatus.STOP)
