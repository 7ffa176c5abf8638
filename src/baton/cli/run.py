"""Working on one task here: `baton run`, `verify-resume`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING

import click

from baton.cli.options import SET, SITE, STORE
from baton.cli.target import Target
from baton.errors import ExitStatus

if TYPE_CHECKING:
    from baton.handover import StopSignal


PROCESSES = click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Training processes on this machine, one a GPU.",
)


@click.command()
@click.argument("plan_or_exp", metavar="PLAN")
@click.option("--task", help="The task to work on; may be left out where PLAN has only one.")
@SITE
@click.option(
    "--store",
    metavar="URL",
    help="Where bytes live; default: where PLAN lies, or the site's store.",
)
@SET
@click.option(
    "--allow-changed",
    metavar="KEY",
    multiple=True,
    help="Go on although this differs from the checkpoint (base, data).",
)
@click.option(
    "--stage", metavar="NAME", envvar="BATON_STAGE", help="The last stage to run; default: all."
)
@PROCESSES
def run(
    plan_or_exp: str,
    task: str | None,
    site: str,
    store: str | None,
    settings: tuple[str, ...],
    allow_changed: tuple[str, ...],
    stage: str | None,
    processes: int,
) -> None:
    """Work on one task: what a container, a Slurm job or the local launcher executes.

    PLAN is a plan.json (a file, or its name inside --store), or what EXP is elsewhere. Exits with
    0 when the task is finished, 75 when it was handed over (run the same again), 78 when running
    again cannot help.
    """
    # Before any slow import: a signal may come while torch loads.
    from baton.process import (
        limit_threads,
        listen,
        log_to_stdout,
        patience_until,
        prepare_gpu_memory,
        stopping_is_no_failure,
        warn_of_a_passing_store,
    )

    stop = listen()
    if processes > 1:
        sys.exit(_run_together(processes, stop))
    log_to_stdout()
    from baton.runner import TaskRunner, submission_id, task_store

    limit_threads(site)
    prepare_gpu_memory()
    if task is None and not plan_or_exp.endswith(".json"):
        # Before freezing asks a hub about anything.
        task = Target.fresh(plan_or_exp, settings, site, store).one_task("run")
    with stopping_is_no_failure(stop):
        target = Target.frozen(plan_or_exp, settings, site, store, patience_until(stop))
    task = task or target.one_task("run")
    if target.place.remote is None:
        warn_of_a_passing_store(target.root)
    runner = TaskRunner(
        plan=target.plan,
        task=target.plan.task(task),
        store=task_store(target.root, target.plan, task),
        mirror=target.place.mirror(target.plan, task),
        stop=stop,
        submission=submission_id(),
        allow_changed=allow_changed,
        until=stage,
    )
    with contextlib.ExitStack() as around:
        around.enter_context(stopping_is_no_failure(stop))
        if sys.stdout.isatty():
            from baton.console import Bars

            bars = around.enter_context(Bars())
            runner.on_progress = lambda values: bars.progress(task, values)
        status = runner.run()
    sys.exit(status)


def _run_together(processes: int, stop: StopSignal) -> int:
    """This command, once for each process."""
    from baton.launchers.processes import run_together

    words = [word for word in sys.argv[1:] if not word.startswith("--processes=")]
    if "--processes" in words:
        place = words.index("--processes")
        del words[place : place + 2]
    return run_together([sys.executable, "-m", "baton", *words], processes, stop)


@click.command("verify-resume")
@click.argument("task")
@SET
@SITE
@STORE
@PROCESSES
def verify_resume(
    task: str, settings: tuple[str, ...], site: str, store: str | None, processes: int
) -> None:
    """Train again between a task's last two checkpoints; say whether the bytes are the same."""
    from baton.process import limit_threads, listen, prepare_gpu_memory, quiet_libraries
    from baton.verify import verify

    if processes > 1:
        sys.exit(_run_together(processes, listen()))
    is_first = os.environ.get("RANK", "0") == "0"
    limit_threads(site)
    prepare_gpu_memory()
    target = Target.submitted(task, settings, site, store)
    meant = target.plan.task(target.one_task("verify-resume"))
    if is_first:
        target.place.bring(target.plan, meant.name, checkpoints=2)
    stop = listen()
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    verdict = verify(target.plan, meant, target.root, stop)
    if is_first:
        click.echo(verdict.text)
    sys.exit(ExitStatus.FINISHED if verdict.identical else ExitStatus.FAILED)
