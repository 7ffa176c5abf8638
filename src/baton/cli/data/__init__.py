"""`baton data`: a pipeline's input files, looked at and prepared before anything is submitted."""

from __future__ import annotations

import click

from baton.cli.data.t5 import t5


@click.group()
def data() -> None:
    """Prepare and examine the data of a pipeline."""


data.add_command(t5)
