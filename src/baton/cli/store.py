"""`baton store`: what a store holds, for people."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from baton.errors import ConfigError, ExitStatus

if TYPE_CHECKING:
    from baton.store.base import Remote

_URL = click.argument("url")


@click.group()
def store() -> None:
    """Look into a store: a folder, s3://bucket/prefix, hf://user/repository or hf://buckets/user/bucket."""


@store.command()
@_URL
def ls(url: str) -> None:
    """What is there: every version of every experiment, its tasks and checkpoints."""
    from baton.store.inventory import contents, versions_in

    opened = _open(url)
    for version in _some(versions_in(opened), url):
        found = contents(opened, version)
        click.echo(f"{version}  {len(found.tasks)} tasks, {_size(found.bytes)}")
        for task in found.tasks.values():
            done = ", ".join(sorted(task.stages_done)) or "nothing"
            steps = "; ".join(
                f"{prefix.split('/')[2]} steps {', '.join(map(str, sorted(steps)))}"
                for prefix, steps in task.steps.items()
            )
            click.echo(f"  {task.name}: {task.legs} legs, done: {done}; {steps or 'no checkpoint'}")


@store.command()
@_URL
@click.option("--quick", is_flag=True, help="Names and sizes only; reads no large file.")
def verify(url: str, quick: bool) -> None:
    """Is everything whole? Exits with 1 if not."""
    from baton.store.inventory import verify as look
    from baton.store.inventory import versions_in

    opened, damaged = _open(url), 0
    for version in _some(versions_in(opened), url):
        for finding in look(opened, version, quick=quick):
            said = finding.problem or f"whole, {finding.files} files, {_size(finding.bytes)}"
            damaged += bool(finding.problem)
            mark = "DAMAGED " if finding.problem else ""
            click.echo(f"{mark}{version}/{finding.what}: {said}")
    if damaged:
        click.echo(f"{damaged} damaged; a leg that resumes sets them aside by itself", err=True)
    sys.exit(ExitStatus.FAILED if damaged else ExitStatus.FINISHED)


@store.command()
@_URL
@click.option("--delete", is_flag=True, help="Delete it; without, only say what could be.")
def gc(url: str, delete: bool) -> None:
    """What nothing refers to: left by kills, rotation and removed runs."""
    from baton.store.base import Batch
    from baton.store.inventory import garbage, versions_in

    opened = _open(url)
    for version in _some(versions_in(opened), url):
        found = garbage(opened, version)
        if found.left_alone:
            click.echo(f"{version}: left alone, {found.left_alone}")
            continue
        verb = "deleted" if delete else "could delete"
        click.echo(f"{version}: {verb} {len(found.names)} names, {_size(found.bytes)}")
        for name in found.names:
            click.echo(f"  {name}")
        if delete and found.names:
            opened.below(version).commit(Batch(message="gc", deletes=found.names))
    if delete and (sweep := getattr(opened, "sweep_uploads", None)) is not None:
        for name in sweep():
            click.echo(f"ended an upload that nobody finished: {name}")


@store.command()
@click.argument("source")
@click.argument("target")
def cp(source: str, target: str) -> None:
    """Copy every version from one store to another; what is there is not sent again."""
    from baton.store.copy import copy_version
    from baton.store.inventory import versions_in

    origin, copy = _open(source), _open(target)
    for version in _some(versions_in(origin), source):
        copy_version(origin, copy, version, click.echo)


def _open(url: str) -> Remote:
    from baton.store.local import LocalStore
    from baton.store.open import is_remote, local_folder, open_remote

    return open_remote(url) if is_remote(url) else LocalStore(local_folder(url))


def _some(versions: list[str], url: str) -> list[str]:
    if not versions:
        raise ConfigError(f"there is no run of an experiment in {url}")
    return versions


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
