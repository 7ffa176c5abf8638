"""The `baton` command: parsing and printing only."""

from __future__ import annotations

import codecs
import errno
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

import baton
from baton.errors import BatonError, ConfigError, ExitStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from baton.config.site import Site
    from baton.launchers.base import Drill, Request
    from baton.record import Plan
    from baton.status import TaskStatus

# Imports of everything else stand inside the commands: `baton --help` must not wait for them.

_SET = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a value of the experiment, e.g. train.epochs=1; may be repeated.",
)
_STORE = click.option(
    "--store", metavar="URL", help="Where bytes live; overrides the site's store."
)
_SITE = click.option("--site", default="local", show_default=True, help="A file in launch/.")
# What submitting does about a task that is not to be started.
_LEFT_ALONE = {"finished": "skip", "running": "leave running", "pending": "leave in the queue"}
_AT_MOST_NAMED = 10
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(baton.__version__)
def cli() -> None:
    """Containerized, preemption-safe LLM training jobs.

    EXP is an experiment (medical_qa), one task of one (qlora_100k, or smoke/medical_qa/lora_20k),
    or a path to a YAML file. Submitting again is resuming: what is finished is skipped.
    """


@cli.command()
@click.argument("exp")
@_SET
def check(exp: str, settings: tuple[str, ...]) -> None:
    """Check an experiment file: every problem at once."""
    plan, tasks = _plan(exp, settings)
    click.echo(f"{plan.experiment}: {len(tasks)} of {len(plan.tasks)} tasks, digest {plan.digest}")


@cli.command()
@click.argument("exp")
@_SET
@_SITE
@_STORE
@_JSON
def plan(exp: str, settings: tuple[str, ...], site: str, store: str | None, as_json: bool) -> None:
    """Show an experiment's tasks, its digest, and what a submit would run."""
    frozen, tasks = _plan(exp, settings)
    if as_json:
        click.echo(frozen.to_json().decode(), nl=False)
        return
    root = _store_root(site, store)
    click.echo(f"{frozen.experiment}  pipeline {frozen.pipeline}  digest {frozen.digest}")
    click.echo(f"store {root / frozen.experiment / frozen.digest}")
    for status in _statuses(_site(site), root, frozen, tasks):
        does = _LEFT_ALONE.get(status.state, "run")
        click.echo(f"  {status.task}: {status.state} -> {does}")


@cli.command()
@click.argument("exp")
@_SET
@_SITE
@_STORE
def freeze(exp: str, settings: tuple[str, ...], site: str, store: str | None) -> None:
    """Write an experiment's plan; print its path and, a line each, the tasks meant by EXP."""
    from baton.frozen import freeze as freeze_plan

    frozen, tasks = _plan(exp, settings)
    path = freeze_plan(frozen, _store_root(site, store))
    for line in (path.absolute(), *tasks):
        click.echo(line)


@cli.command()
@click.argument("exp")
@_SET
@_SITE
@_STORE
@click.option("--dry-run", is_flag=True, help="Show exactly what would run, and run nothing.")
@click.option("--max-parallel", type=click.IntRange(1), help="Tasks at once.")
@click.option("--detach", is_flag=True, help="Leave it running and return.")
@click.option(
    "--drill",
    "drills",
    metavar="TASK=SIGNAL@STEP",
    multiple=True,
    help="Fire drill: send TERM, KILL, … to a task at a step; may be repeated.",
)
def submit(
    exp: str,
    settings: tuple[str, ...],
    site: str,
    store: str | None,
    dry_run: bool,
    max_parallel: int | None,
    detach: bool,
    drills: tuple[str, ...],
) -> None:
    """Run what is missing of an experiment or task, through every handover."""
    from baton.frozen import freeze as freeze_plan
    from baton.frozen import path_of, read
    from baton.handover import StopSignal
    from baton.launchers.base import Drill
    from baton.launchers.choose import launcher_for
    from baton.record import replace

    frozen, tasks = _plan(exp, settings)
    where = _site(site)
    root = _store_root(site, store)
    parsed = [Drill.parse(text) for text in drills]
    unknown = [drill.task for drill in parsed if drill.task not in tasks]
    if unknown:
        raise ConfigError(
            f"--drill {unknown[0]}: not a task of this submission: {', '.join(tasks)}"
        )
    stop = StopSignal()
    launcher = launcher_for(where, stop=stop, max_parallel=max_parallel)
    look = _statuses if dry_run else _look
    states = {s.task: s.state for s in look(where, root, frozen, tasks)}
    waiting = [task for task in tasks if states[task] not in _LEFT_ALONE]
    at_work = [task for task in tasks if states[task] in ("running", "pending")]
    if dry_run:
        path = path_of(root, frozen)
        click.echo(f"would write {path}" if not path.exists() else f"plan {path}")
        for task in set(tasks) - set(waiting):
            click.echo(f"would skip: {task} is {states[task]}")
        click.echo(launcher.preview(_request(frozen, root, waiting)))
        return
    path = freeze_plan(frozen, root)
    if detach and launcher.waits:
        _detach(frozen, root)
        return
    click.echo(f"{frozen.experiment}/{frozen.digest}: {len(waiting)} of {len(tasks)} tasks to run")
    for task in at_work[:_AT_MOST_NAMED]:
        click.echo(f"{task}: {states[task]} already, left alone")
    if at_work[_AT_MOST_NAMED:]:
        click.echo(f"and {len(at_work) - _AT_MOST_NAMED} more, left alone")
    from baton.console import view

    # How stages share jobs is no part of what is computed: it may change at every submission.
    submitted = replace(read(path), split=frozen.split)
    request = _request(submitted, root, waiting, parsed)
    if launcher.waits:
        stop.install()
    with view() as shown:
        ended = launcher.submit(request, shown)
    if launcher.waits:
        ended |= dict.fromkeys(at_work, ExitStatus.HANDED_OVER)
    _finish(ended)


@cli.command()
@click.argument("plan_or_exp", metavar="PLAN")
@click.option("--task", required=True, help="The task to work on.")
@_SITE
@click.option(
    "--store",
    metavar="URL",
    help="Where bytes live; default: where PLAN lies, or the site's store.",
)
@_SET
@click.option(
    "--allow-changed",
    metavar="KEY",
    multiple=True,
    help="Go on although this differs from the checkpoint (base, data).",
)
@click.option(
    "--stage", metavar="NAME", envvar="BATON_STAGE", help="The last stage to run; default: all."
)
def run(
    plan_or_exp: str,
    task: str,
    site: str,
    store: str | None,
    settings: tuple[str, ...],
    allow_changed: tuple[str, ...],
    stage: str | None,
) -> None:
    """Work on one task: what a container, a Slurm job or the local launcher executes.

    PLAN is a plan.json, or an experiment's name. Exits with 0 when the task is finished, 75 when
    it was handed over (run the same again), 78 when running again cannot help.
    """
    # Before any slow import: a signal may come while torch loads.
    from baton.process import limit_threads, listen, log_to_stdout

    stop = listen()
    log_to_stdout()
    from baton.runner import TaskRunner, submission_id, task_store

    limit_threads(site)
    frozen, root = _plan_to_run(plan_or_exp, site, store, settings)
    runner = TaskRunner(
        plan=frozen,
        task=frozen.task(task),
        store=task_store(root, frozen, task),
        stop=stop,
        submission=submission_id(),
        allow_changed=allow_changed,
        until=stage,
    )
    if sys.stdout.isatty():
        from baton.console import Bars

        with Bars() as bars:
            runner.on_progress = lambda values: bars.progress(task, values)
            status = runner.run()
    else:
        status = runner.run()
    sys.exit(status)


@cli.command()
@click.argument("exp")
@_SET
@_SITE
@_STORE
@_JSON
def status(
    exp: str, settings: tuple[str, ...], site: str, store: str | None, as_json: bool
) -> None:
    """Where every task stands: state, leg, step, speed, durable step, last reason."""
    frozen, tasks, root = _submitted(exp, settings, site, store)
    found = _statuses(_site(site), root, frozen, tasks)
    if as_json:
        click.echo(json.dumps([s.to_json() for s in found], indent=2))
        return
    from baton.console import job_legs_table, print_table, status_table

    print_table(status_table(frozen, found))
    if len(found) == 1 and found[0].job_legs:
        print_table(job_legs_table(found[0].job_legs))


@cli.command()
@click.argument("task")
@_SET
@_SITE
@_STORE
@click.option("-f", "--follow", is_flag=True, help="Keep printing, across legs, until it ends.")
def logs(task: str, settings: tuple[str, ...], site: str, store: str | None, follow: bool) -> None:
    """Print the log of a task, all legs in one."""
    from baton.launchers.base import LOG
    from baton.launchers.choose import launcher_for
    from baton.runner import task_store

    frozen, tasks, root = _submitted(task, settings, site, store)
    if len(tasks) != 1:
        raise ConfigError(f"logs is about one task; {frozen.experiment} has: {', '.join(tasks)}")
    path = task_store(root, frozen, tasks[0]).root / LOG
    where = _site(site)
    launcher = launcher_for(where)
    text = codecs.getincrementaldecoder("utf-8")("replace")
    looked, shown = -launcher.look_every_seconds, 0
    while True:
        if path.exists():
            with open(path, "rb") as log:
                log.seek(shown)
                more = log.read()
            shown += len(more)
            click.echo(text.decode(more), nl=False)
        if not follow:
            break
        # What the records say costs nothing; the launcher is asked now and then.
        state = _recorded(root, frozen, tasks)[0].state
        if state != "running" and time.monotonic() - looked >= launcher.look_every_seconds:
            looked = time.monotonic()
            state = _statuses(where, root, frozen, tasks)[0].state
            follow = state in ("running", "pending", "handed over", "stage done", "lost")
        elif state in ("finished", "cancelled"):
            follow = False
        if follow:
            time.sleep(0.5)
    if not shown:
        raise ConfigError(f"{tasks[0]} has no log yet; it was not started here ({path})")


@cli.command()
@click.argument("exp")
@_SET
@_SITE
@_STORE
def cancel(exp: str, settings: tuple[str, ...], site: str, store: str | None) -> None:
    """Stop running tasks with their work saved; submit goes on from there."""
    from baton.console import Lines
    from baton.frozen import path_of
    from baton.launchers.choose import launcher_for

    frozen, tasks, root = _submitted(exp, settings, site, store)
    if not path_of(root, frozen).exists():
        raise ConfigError(f"nothing to cancel: {frozen.experiment} was not submitted to {root}")
    waiting = [s.task for s in _recorded(root, frozen, tasks) if s.state != "finished"]
    launcher_for(_site(site)).cancel(_request(frozen, root, waiting), Lines())


@cli.command()
@click.argument("exp")
@_SET
@_SITE
@_STORE
@click.option("--out", type=click.Path(path_type=Path), help="Default: results/EXPERIMENT.")
@_JSON
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

    frozen, _, root = _submitted(exp, settings, site, store)
    every = [task.name for task in frozen.tasks]
    states = {s.task: s.state for s in _recorded(root, frozen, every)}
    place = LocalStore(root / frozen.experiment / frozen.digest)
    target = out or Path("results") / frozen.experiment
    collected = gather(place, frozen, target, states=states)
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


@cli.command("verify-resume")
@click.argument("task")
@_SET
@_SITE
@_STORE
def verify_resume(task: str, settings: tuple[str, ...], site: str, store: str | None) -> None:
    """Train again between a task's last two checkpoints; say whether the bytes are the same."""
    from baton.process import limit_threads, listen, quiet_libraries
    from baton.verify import verify

    limit_threads(site)
    frozen, tasks, root = _submitted(task, settings, site, store)
    if len(tasks) != 1:
        raise ConfigError(f"verify-resume is about one task; name one of: {', '.join(tasks)}")
    stop = listen()
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    verdict = verify(frozen, frozen.task(tasks[0]), root, stop)
    click.echo(verdict.text)
    sys.exit(ExitStatus.FINISHED if verdict.identical else ExitStatus.FAILED)


@cli.command()
@_SITE
@_STORE
def doctor(site: str, store: str | None) -> None:
    """Check a site from here, and say what to mend."""
    from baton.doctor import examine, exit_status

    where = _site(site)
    findings = []
    for finding in examine(where, _store_root(site, store)):
        findings.append(finding)
        click.echo(finding.text)
    sys.exit(exit_status(findings))


# --- what the commands share ---------------------------------------------------------------


def _plan(exp: str, settings: tuple[str, ...]) -> tuple[Plan, list[str]]:
    """The plan of what `exp` names, and the tasks of it that are meant."""
    from baton.legs import utc_now
    from baton.plan import build_plan, select

    selection = select(exp, settings)
    frozen = build_plan(selection.experiment, created=utc_now())
    names = [task.name for task in frozen.tasks]
    return frozen, [selection.task] if selection.task else names


def _submitted(
    exp: str, settings: tuple[str, ...], site: str, store: str | None
) -> tuple[Plan, list[str], Path]:
    """The plan as it was frozen at its submission, if it was; EXP may be that plan.json."""
    from baton.frozen import path_of, read, versions

    if exp.endswith(".json"):
        plan, root = _plan_to_run(exp, site, store, settings)
        return plan, [task.name for task in plan.tasks], root
    plan, tasks = _plan(exp, settings)
    root = _store_root(site, store)
    path = path_of(root, plan)
    if path.exists():
        return read(path), tasks, root
    others = versions(root, plan.experiment)
    there = f"; there are runs of other versions: {', '.join(others)}" if others else ""
    click.echo(
        f"note: {plan.experiment} as it is now ({plan.digest}) was not submitted to {root}{there}",
        err=True,
    )
    return plan, tasks, root


def _plan_to_run(
    plan_or_exp: str, site: str, store: str | None, settings: tuple[str, ...]
) -> tuple[Plan, Path]:
    """The frozen plan that PLAN names, and the root of the store it belongs to."""
    from baton.frozen import freeze as freeze_plan
    from baton.frozen import read, root_of

    path = Path(plan_or_exp)
    if path.suffix != ".json":
        fresh, _ = _plan(plan_or_exp, settings)
        path = freeze_plan(fresh, _store_root(site, store))
    plan = read(path)
    return plan, root_of(path, plan) if store is None else _store_root(site, store)


def _request(
    frozen: Plan, root: Path, tasks: Sequence[str], drills: Sequence[Drill] = ()
) -> Request:
    from baton.frozen import path_of
    from baton.launchers.base import Request

    path = path_of(root, frozen)
    return Request(plan=frozen, plan_path=path, store_root=root, tasks=tasks, drills=drills)


def _recorded(root: Path, frozen: Plan, tasks: Sequence[str]) -> list[TaskStatus]:
    """Where the tasks stand as far as the records know."""
    from baton.pipelines import PIPELINES
    from baton.status import status_of

    stages = PIPELINES[frozen.pipeline]().stage_names
    return [status_of(root, frozen, stages, task) for task in tasks]


def _look(where: Site, root: Path, frozen: Plan, tasks: Sequence[str]) -> list[TaskStatus]:
    """Where the tasks stand, with what the site's scheduler knows."""
    from baton.launchers.choose import launcher_for

    recorded = _recorded(root, frozen, tasks)
    return launcher_for(where).look(_request(frozen, root, tasks), recorded)


def _statuses(where: Site, root: Path, frozen: Plan, tasks: Sequence[str]) -> list[TaskStatus]:
    """As `_look`, but a scheduler that is out of reach is no reason to show nothing."""
    try:
        return _look(where, root, frozen, tasks)
    except BatonError as error:
        click.echo(f"note: only what the records say; {error}", err=True)
        return _recorded(root, frozen, tasks)


def _site(name: str) -> Site:
    from baton.config.site import load_site

    return load_site(name)


def _store_root(site: str, store: str | None) -> Path:
    from baton.store.open import open_store

    return Path(open_store(_site(site).store if store is None else store).url)


def _detach(frozen: Plan, root: Path) -> None:
    """Start the same command again in a session of its own, and leave."""
    folder = root / frozen.experiment / frozen.digest
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for word in sys.argv[1:] if word != "--detach"]
    with open(folder / "launcher.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    click.echo(
        f"left running as process {process.pid}, log in {folder / 'launcher.log'};"
        f" look with: baton status {frozen.experiment}"
    )


def _finish(ended: dict[str, ExitStatus]) -> None:
    """Exit with the worst of what the tasks ended with."""
    order = (ExitStatus.STOP, ExitStatus.FAILED, ExitStatus.HANDED_OVER)
    for status in order:
        tasks = [task for task, how in ended.items() if how == status]
        if tasks:
            word = {75: "handed over", 78: "stopped"}.get(status, "failed")
            click.echo(f"{word}: {', '.join(tasks)}", err=True)
    sys.exit(next((s for s in order if s in ended.values()), ExitStatus.FINISHED))
