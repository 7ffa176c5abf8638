"""The batch script of a job array: what it asks Slurm for, and the lines it runs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.config.slurm_site import SlurmSite
from baton.errors import ConfigError

# Shorter values would be found by chance: `1`, `true`.
_SECRET_CHARACTERS = 8
# What the last, collecting job is called; a site may shape it under `stages.collect`.
COLLECT = "collect"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One array of one submission, and everything its script needs to know.

    Attributes:
        site: as this array's stage sees it.
        stage: the last stage to run; empty runs a task to its end, `collect` collects.
        after: what this array waits for, as `--dependency` takes it.
        tasks_file: one task a line, element 0 first.
        home: the project's folder, with `slurm/leg.sh` in it.
    """

    site: SlurmSite
    name: str
    stage: str
    elements: int
    max_parallel: int | None
    plan_path: Path
    store_url: str
    tasks_file: Path
    folder: Path
    home: Path
    after: str | None = None

    @property
    def script(self) -> Path:
        """Where a copy of the script is kept, for people."""
        return self.folder / f"{self.stage or 'task'}.sbatch"

    @property
    def gpu_hours(self) -> float:
        """What one leg of every element asks for."""
        return self.site.gpu_hours * self.elements

    @property
    def price(self) -> float | None:
        return None if self.site.price is None else self.site.price * self.gpu_hours

    def parameters(self) -> dict[str, Any]:
        """What the job asks for, as submitit names it."""
        site, gpu = self.site, self.site.gpu_type
        per_node = site.gpus // site.nodes
        more: dict[str, Any] = {
            "time": site.time,
            "output": _pattern(self.folder / f"{self.stage or 'task'}-%a.log"),
            "chdir": str(Path.cwd()),
            "export": ",".join(site.env) if site.env else "NONE",
            # B: signals the batch script alone, which passes it on; USR2 because NCCL has
            # claimed USR1 before.
            "signal": f"B:USR2@{site.grace_seconds}",
            "requeue" if site.requeue == "auto" else "no-requeue": True,
        }
        if self.after:
            more["kill-on-invalid-dep"] = "yes"
        return {
            "job_name": self.name,
            "partition": site.job_partition,
            "account": site.account,
            "qos": site.qos,
            "nodes": site.nodes,
            "ntasks_per_node": site.processes_per_task // site.nodes,
            "cpus_per_task": site.cpus,
            "mem": None if site.memory_gb is None else f"{round(site.memory_gb * 1024)}M",
            "gres": f"{gpu.name}:{per_node}" if gpu else None,
            "constraint": gpu.constraint if gpu else None,
            "exclusive": True if site.exclusive else None,
            "mail_user": site.mail,
            "mail_type": ",".join(site.mail_events) if site.mail and site.mail_events else None,
            "dependency": self.after,
            "map_count": self.elements,
            "array_parallelism": self.max_parallel or site.max_parallel or self.elements,
            "wckey": None,
            "stderr_to_stdout": True,
            "use_srun": False,
            "additional_parameters": more | site.flag_values(),
        }

    def setup(self) -> list[str]:
        """The lines before the last one."""
        if self.stage == COLLECT:
            return ["set -eo pipefail", f"export BATON_HOME={_word(self.home)}", *self.site.setup]
        tasks = self.plan_path.parent / "tasks"
        return [
            "set -eo pipefail",
            # Slurm sets it to the names above, and an srun in here would pass on no others.
            "export SLURM_EXPORT_ENV=ALL",
            *(f"export {name}={shlex.quote(value)}" for name, value in self.settings().items()),
            f'export BATON_SUBMISSION={shlex.quote(f"slurm:{self.name}")}/"$SLURM_ARRAY_TASK_ID"',
            f'task=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {_word(self.tasks_file)})',
            f'folder={_word(tasks)}/"$task"',
            'mkdir -p "$folder"',
            # One log a task, whichever job runs the next leg.
            'exec >>"$folder"/log.txt 2>&1',
            *self.site.setup,
        ]

    def command(self) -> str:
        """The last line; `exec`, so that Slurm's signals reach the script that handles them."""
        if self.stage == COLLECT:
            words = (sys.executable, "-m", "baton", "collect", self.plan_path)
            return f"exec {shlex.join(map(str, words))}"
        return f'exec bash {_word(self.home / "slurm" / "leg.sh")} {_word(self.plan_path)} "$task"'

    def settings(self) -> dict[str, str]:
        """What `slurm/leg.sh` and `baton run` read; none of it is secret."""
        site = self.site
        values = {
            "BATON_HOME": str(self.home),
            "BATON_STORE": self.store_url,
            "BATON_TASKS": f"@{self.tasks_file}",
            "BATON_SCRIPT": str(self.script),
            "BATON_STAGE": self.stage,
            "BATON_RUNTIME": site.runtime,
            "BATON_IMAGE": site.image or "",
            "BATON_MOUNTS": " ".join(site.mounts),
            "BATON_ENV_FILE": str(Path(site.env_file).expanduser()) if site.env_file else "",
            "BATON_PYTHON": python_of(site) if site.runtime == "none" else "",
            "BATON_GRACE_SECONDS": str(site.grace_seconds),
            "BATON_RETRIES": str(site.retries),
            "BATON_REQUEUE": site.requeue,
            "OMP_NUM_THREADS": str(site.threads),
        }
        return {name: value for name, value in values.items() if value}


def python_of(site: SlurmSite) -> str:
    """The interpreter of a leg without a container."""
    return str(Path(site.venv).expanduser() / "bin" / "python") if site.venv else sys.executable


def refuse_secrets(script: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise `ConfigError` if a script holds the value of a variable that looks like a secret.

    Whoever may look at the queue may read scripts (`scontrol write batch_script`, accounting).
    """
    for name, value in environment.items():
        is_secret = _SECRET_NAME.search(name) and not value.startswith("/")
        if is_secret and len(value) >= _SECRET_CHARACTERS and value in script:
            raise ConfigError(
                f"the batch script would hold the value of {name}, for everybody to read: remove"
                f" it from the site file (setup, flags, image) and name {name} under `env` instead"
            )


def _pattern(path: Path) -> str:
    """A file name as --output takes it: `%` begins a replacement, except in our own `%a`."""
    folder = str(path.parent).replace("%", "%%")
    if "\\" in folder:
        raise ConfigError(f"store {folder!r}: Slurm does not take a backslash in a log's path")
    return f"{folder}/{path.name}"


def _word(path: Path) -> str:
    return shlex.quote(str(path))
