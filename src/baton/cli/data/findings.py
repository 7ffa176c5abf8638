"""What a check of rows found, said on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import click

from baton.errors import ExitStatus

# Of more notes than that, the first ones and their number say enough.
_SHOWN_NOTES = 20


class Findings(Protocol):
    """Mistakes make a file unusable; notes are about rows that would teach badly."""

    @property
    def mistakes(self) -> Sequence[str]: ...

    @property
    def notes(self) -> Sequence[str]: ...

    @property
    def summary(self) -> str: ...


def say_findings(file: Path, findings: Findings) -> None:
    """Say all mistakes, some notes and the summary; exits with 78 where there are mistakes."""
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
