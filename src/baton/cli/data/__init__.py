"""`baton data PIPELINE …`: look at training data, or make it."""

from __future__ import annotations

import click

from baton.cli.data.clara import clara
from baton.cli.data.questions import questions
from baton.cli.data.raft import raft
from baton.cli.data.t5 import t5


@click.group()
def data() -> None:
    """Check training data before a run, or make it."""


for _pipeline in (clara, questions, raft, t5):
    data.add_command(_pipeline)
