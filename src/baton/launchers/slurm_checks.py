"""What a cluster allows, compared with what a site asks of it."""

from __future__ import annotations

import getpass
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from baton.config.slurm_site import SlurmSite, seconds_of
from baton.errors import BatonError, ConfigError
from baton.launchers.batch import COLLECT, Batch
from baton.launchers.slurm import script_of
from baton.launchers.slurm_commands import is_here, run, test_only

Check: TypeAlias = tuple[Literal["ok", "note", "mend", "wrong"], str, str]

_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun")


def cluster_checks(site: SlurmSite) -> Iterator[Check]:
    """Everything Slurm can be asked about a site, one line each; submits nothing."""
    missing = [command for command in _COMMANDS if not is_here(command)]
    if missing:
        advice = "run this on a login node of the cluster"
        yield "wrong", "slurm", f"not on this machine: {', '.join(missing)}; {advice}"
        return
    try:
        yield "ok", "slurm", run("sbatch", "--version").strip()
        config = _fields(run("scontrol", "show", "config"), line_by_line=True)
        stages = {name: site.for_stage(name) for name in site.stages}
        shapes = {"": site} | stages
        yield from _accounting(site)
        for partition in dict.fromkeys(shape.job_partition for shape in shapes.values()):
            users = [shape for shape in shapes.values() if shape.job_partition == partition]
            yield from _partition(partition, users, config)
        if site.requeue == "auto" and config.get("JobRequeue") == "0":
            yield "ok", "requeue", "JobRequeue=0, but jobs are submitted with --requeue"
        elif site.requeue != "never":
            yield "ok", "requeue", f"{site.requeue}, JobRequeue={config.get('JobRequeue', '?')}"
        else:
            yield "note", "requeue", "never: after a handover, a person must submit again"
        if _number(config.get("MaxArraySize", "")):
            most = _number(config["MaxArraySize"]) - 1
            yield "ok", "array", f"up to {most:,} tasks in one submission (MaxArraySize)"
        for name, shape in shapes.items():
            yield _verdict(name, shape)
    except BatonError as error:
        yield ("wrong" if isinstance(error, ConfigError) else "mend"), "slurm", str(error)


def _accounting(site: SlurmSite) -> Iterator[Check]:
    try:
        columns = "format=account,qos,defaultaccount"
        user = f"user={getpass.getuser()}"
        rows = run("sacctmgr", "-nP", "show", "assoc", user, columns).splitlines()
    except BatonError:
        yield "note", "accounting", "none: GPU-hours and past legs are what our records say"
        return
    accounts = {row.split("|")[0] for row in rows}
    allowed = {qos for row in rows for qos in row.split("|")[1].split(",") if qos}
    if site.account and rows and site.account not in accounts:
        yours = ", ".join(sorted(accounts))
        yield "wrong", "account", f"{site.account!r} is not yours; you have: {yours}"
    elif site.account:
        yield "ok", "account", site.account
    else:
        yield "ok", "account", "the default one"
    for qos in {site.qos, *(job.qos for job in site.stages.values())} - {None}:
        if allowed and qos not in allowed:
            yours = ", ".join(sorted(allowed))
            yield "wrong", "qos", f"{qos!r} is not yours; you have: {yours}"
        else:
            yield "ok", "qos", str(qos)


def _partition(
    name: str | None, shapes: list[SlurmSite], config: Mapping[str, str]
) -> Iterator[Check]:
    """The partition, and of each job in it: time, grace, GPUs."""
    known = {
        fields["PartitionName"]: fields
        for fields in map(_fields, run("scontrol", "-o", "show", "partition").splitlines())
        if "PartitionName" in fields
    }
    defaults = [n for n, fields in known.items() if fields.get("Default") == "YES"]
    if name is None and not defaults:
        yield "wrong", "partition", f"the cluster has no default; name one of {', '.join(known)}"
        return
    if (name or defaults[0]) not in known:
        yield "wrong", "partition", f"there is no {name!r}; there are: {', '.join(known)}"
        return
    name = name or defaults[0]
    fields = known[name]
    about = f"partition {name}"
    if fields.get("State") != "UP":
        yield "mend", about, f"is {fields.get('State')}; jobs would wait"
    else:
        yield "ok", about, f"up, {fields.get('TotalNodes', '?')} nodes"
    limit = _seconds(fields.get("MaxTime", "UNLIMITED"))
    longest = max(seconds_of(shape.time) for shape in shapes)
    if limit is not None and longest > limit:
        yield "wrong", about, f"allows {fields['MaxTime']}; shorten `time`"
    yield from _grace(about, shapes[0], fields, config)
    yield from _gpus(name, shapes)


def _grace(
    about: str, site: SlurmSite, fields: Mapping[str, str], config: Mapping[str, str]
) -> Iterator[Check]:
    mode = fields.get("PreemptMode", "OFF")
    if mode == "OFF" or config.get("PreemptType", "preempt/none") == "preempt/none":
        yield "ok", about, "jobs are not preempted here"
        return
    # At a preemption: TERM, GraceTime, then TERM again, KillWait, KILL.
    given = (_seconds(fields.get("GraceTime", "0")) or 0) + _number(config.get("KillWait", "0"))
    if given < site.grace_seconds:
        yield (
            "note",
            about,
            f"a preempted job gets {given} s (GraceTime + KillWait), less than grace_seconds"
            f" {site.grace_seconds}: a save must fit into {given} s, or the leg goes back to its"
            " last checkpoint; ask for a longer GraceTime, or save more often",
        )
    else:
        yield "ok", about, f"a preempted job gets {given} s, grace_seconds is {site.grace_seconds}"
    if mode == "CANCEL":
        yield (
            "note",
            about,
            "PreemptMode=CANCEL: Slurm itself ends a preempted job; leg.sh starts it again when it"
            " was asked in time, a killed leg waits for a person",
        )


def _gpus(partition: str, shapes: list[SlurmSite]) -> Iterator[Check]:
    rows = [row.split("|") for row in run("sinfo", "-h", "-p", partition, "-o", "%G|%f").split()]
    for shape in shapes:
        gpu = shape.gpu_type
        if gpu is None:
            continue
        per_node = shape.gpus // shape.nodes
        fitting = [row for row in rows if _gres_count(row[0], gpu.name) >= per_node]
        if gpu.constraint and re.fullmatch(r"[\w.-]+", gpu.constraint):
            fitting = [row for row in fitting if gpu.constraint in row[1].split(",")]
        what = f"{per_node} x {gpu.name}" + (f" with {gpu.constraint}" if gpu.constraint else "")
        if fitting:
            yield "ok", f"gpu {shape.gpu}", f"{partition} has nodes with {what}"
        else:
            there = ", ".join(sorted({row[0] for row in rows}))
            yield (
                "wrong",
                f"gpu {shape.gpu}",
                f"{partition} has no node with {what}; it has {there}",
            )


def _gres_count(listed: str, wanted: str) -> int:
    """How many of `gpu:a100` are in `gpu:a100:4(S:0-1),shard:8`; `gpu` is of any type."""
    total = 0
    for entry in re.sub(r"\([^)]*\)", "", listed).split(","):
        parts = entry.split(":")
        count = int(parts[-1]) if parts[-1].isdigit() else 1
        names = parts[:-1] if parts[-1].isdigit() else parts
        if ":".join(names) == wanted or (wanted == "gpu" and names[0] == "gpu"):
            total += count
    return total


def _verdict(stage: str, site: SlurmSite) -> Check:
    """What sbatch itself would say to a job of one element."""
    about = f"sbatch --test-only{f' ({stage})' if stage else ''}"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        batch = Batch(
            site=site,
            name="baton-doctor",
            stage="" if stage == COLLECT else stage,
            elements=1,
            max_parallel=None,
            plan_path=place / "plan.json",
            store_url=str(place),
            tasks_file=place / "tasks.txt",
            folder=place,
            home=place,
        )
        batch.script.write_text(script_of(batch), encoding="utf-8")
        try:
            said = test_only(str(batch.script))
        except ConfigError as error:
            return "wrong", about, str(error)
        except BatonError as error:
            return "mend", about, str(error)
        return "ok", about, re.sub(r"^Job \d+ to", "would", said)


def _fields(text: str, *, line_by_line: bool = False) -> dict[str, str]:
    """`Key=value` words, or `Key = value` lines, of scontrol."""
    if line_by_line:
        pairs = [line.partition("=") for line in text.splitlines()]
    else:
        pairs = [word.partition("=") for word in text.split()]
    return {key.strip(): value.strip() for key, found, value in pairs if found}


def _number(text: str) -> int:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def _seconds(text: str) -> int | None:
    """Seconds of `1-00:00:00`, `01:00:00` or `30`; None without a limit."""
    if text in ("UNLIMITED", "INFINITE", "NONE", "None"):
        return None
    if text.isdigit():
        return int(text)
    days, _, rest = text.rpartition("-")
    hours, minutes, seconds = map(int, rest.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
