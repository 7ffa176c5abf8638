"""The `baton` command: parsing and printing only.

Imports of all that works stand inside the commands: `baton --help` must not wait for them.
"""

from __future__ import annotations

import errno
import sys

import click

import baton
from baton.cli.collect import collect
from baton.cli.data import data
from baton.cli.doctor import doctor
from baton.cli.experiment import check, freeze, plan
from baton.cli.export import export
from baton.cli.generate import generate
from baton.cli.run import run, verify_resume
from baton.cli.store import store
from baton.cli.submit import submit
from baton.cli.watch import cancel, logs, status
from baton.errors import BatonError, ConfigError, ExitStatus


def main() -> None:
    """Run the command line; every expected error ends here, as text and an exit status."""
    try:
        cli(standalone_mode=False)
    except BatonError as error:
        lines = error.problems if isinstance(error, ConfigError) else [str(error)]
        for line in lines:
            click.echo(f"error: {line}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        from baton.store.base import explained

        click.echo(f"error: {explained(error, f'writing {error.filename}')}", err=True)
        sys.exit(ExitStatus.FAILED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(ExitStatus.FAILED)


class Commands(click.Group):
    """Commands by name, and the pipelines: `baton medical_qa …` is `baton run medical_qa …`.

    An image's entrypoint is `baton`, so a pipeline's name is all that `docker run` needs.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            from baton.pipelines import PIPELINES

            if args[0] in PIPELINES:
                return "run", run, args
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(baton.__version__)
def cli() -> None:
    """Containerized, preemption-safe LLM training jobs.

    EXP is an experiment (medical_qa), one task of one (qlora_100k, or smoke/medical_qa/lora_20k),
    or a path to a YAML file. Submitting again is resuming: what is finished is skipped.
    A pipeline's name in the place of a command means `run`: baton medical_qa --task qlora_100k.
    """


for _command in (
    check,
    plan,
    freeze,
    submit,
    run,
    status,
    logs,
    cancel,
    collect,
    export,
    generate,
    data,
    verify_resume,
    doctor,
    store,
):
    cli.add_command(_command)
