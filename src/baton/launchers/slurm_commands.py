"""Slurm's commands: run here, and their refusals in words that say what to mend."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from baton.errors import BatonError, ConfigError, SchedulerError

# The controller of a large cluster may think for a while; longer than this is an outage.
_PATIENCE_SECONDS = 60

# (what Slurm says, what it means for the site file; these do not mend themselves)
_WRONG = (
    (r"invalid partition", "no such partition: mend `partition` (`sinfo -s` lists them)"),
    (
        r"invalid account",
        "this account may not be used here: mend `account`"
        " (`sacctmgr show assoc user=$USER format=account,partition,qos` lists yours)",
    ),
    (r"invalid qos", "no such QOS for you: mend `qos` (the same list shows yours)"),
    (
        r"time limit",
        "the partition does not allow jobs this long: shorten `time` (`sinfo -s`)",
    ),
    (
        r"invalid feature",
        "no node has this feature: mend `constraint` of the gpu type (`sinfo -o %N,%f`)",
    ),
    (
        r"generic resource|gres",
        "no node has these GPUs: mend `gres` of the gpu type (`sinfo -o %N,%G`)",
    ),
    (
        r"node configuration is not available|more processors|cpu count per node",
        "no node has this many GPUs, cores or this much memory together: lower `gpus_per_task`,"
        " `cpus`, `processes` or `memory_gb` (`sinfo -o %N,%c,%m,%G`)",
    ),
    (r"memory specification", "no node has this much memory: lower `memory_gb` (`sinfo -o %N,%m`)"),
    (
        r"job array specification",
        "the array is larger than this cluster takes: submit fewer tasks at once"
        " (`scontrol show config | grep MaxArraySize`)",
    ),
    (r"group not permitted", "your group may not use this partition: choose another `partition`"),
    (r"unrecognized option|invalid option", "this Slurm does not know a flag: mend `flags`"),
    (
        r"process configuration file|configuration source|ClusterName needs",
        "this machine is no client of a Slurm cluster: submit from a login node, or set SLURM_CONF",
    ),
)
# (what Slurm says, what to do; later the same may well go through)
_LATER = (
    (
        r"violates accounting/qos|QOSMax|AssocMax|AssocGrp|QOSGrp|MaxSubmit|MaxJobs",
        "you have as many jobs as your account or QOS allows: wait until some have ended, or"
        " submit single tasks",
    ),
    (
        r"unable to contact|connection refused|timed out|communication",
        "the controller does not answer: try again later (`scontrol ping`)",
    ),
    (r"partition.*(down|inactive|drain)", "the partition is closed at the moment: try later"),
    (r"dependency problem", "the job it would wait for is gone: submit again"),
    (r"slurm temporarily unable to accept|resource temporarily", "try again later"),
)


def run(*words: str) -> str:
    """Output of a Slurm command, times in UTC.

    Raises:
        ConfigError: the command is not on this machine, or refuses for good.
        SchedulerError: it does not answer.
    """
    return _run(*words).stdout


def test_only(script: str) -> str:
    """Slurm's verdict on a script, which it does not take. Raises as `run` does."""
    said = _run("sbatch", "--test-only", script).stderr
    return said.strip().removeprefix("sbatch: ")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    require(words[0])
    try:
        ended = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
            env=os.environ | {"TZ": "UTC", "SLURM_TIME_FORMAT": "standard"},
        )
    except subprocess.TimeoutExpired:
        raise SchedulerError(
            f"{words[0]} did not answer in {_PATIENCE_SECONDS} s; try again later (`scontrol ping`)"
        ) from None
    if ended.returncode:
        raise refusal(words[0], ended.stderr)
    return ended


def require(command: str) -> None:
    """Raise `ConfigError` unless this machine has a Slurm command."""
    if not is_here(command):
        raise ConfigError(
            f"there is no {command} on this machine: run baton on a login node of the cluster,"
            " or choose another --site"
        )


def is_here(command: str = "squeue") -> bool:
    return shutil.which(command) is not None


def refusal(command: str, said: str) -> BatonError:
    """What a command printed when it refused, as an error with advice."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    short = "; ".join(dict.fromkeys(_bare(line, command) for line in lines))
    for table, kind in ((_LATER, SchedulerError), (_WRONG, ConfigError)):
        for pattern, advice in table:
            if re.search(pattern, said, re.IGNORECASE):
                return kind(f"{command}: {short}. That is: {advice}")
    return SchedulerError(f"{command}: {short or 'failed without a word'}")


def _bare(line: str, command: str) -> str:
    line = re.sub(rf"^{command}: (error|fatal): ", "", line)
    return re.sub(r"^(Batch job submission failed|allocation failure): ", "", line).rstrip(".")


def lines_of(text: str, columns: int) -> list[Sequence[str]]:
    """Rows of `a|b|c` output; the last column may hold a `|` itself."""
    rows = [line.split("|", columns - 1) for line in text.splitlines()]
    return [row for row in rows if len(row) == columns]
