"""A far end made of files: `sbatch`, `squeue` and the others answer with what a test put there."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sacctmgr", "sinfo", "srun")
# Each notes its words and environment, and answers with the file NAME.out, .err and .rc, of the
# first word after the name where there is one (`scontrol-show-config.out`).
STUB = """\
#!/bin/sh
here={folder}
name=$(basename "$0")
printf '%s\\n' "$name $*" >>"$here/calls.txt"
env >"$here/environment.txt"
answer=$here/$name
for word in "$@"; do
  case $word in -*) ;; *) tried=$answer-$word; [ -e "$tried.out" ] && answer=$tried ;; esac
done
case "$name $*" in
  "sbatch --version") echo slurm-wlm 22.05.8; exit 0 ;;
  "sbatch --test-only "*) answer=$here/test-only ;;
  "scontrol show config") answer=$here/config ;;
  "scontrol -o show partition") answer=$here/partition ;;
  "sbatch "*) number=$(cat "$here/number"); echo $((number + 1)) >"$here/number"
     cp "$1" "$here/submitted-$number.sh"
     [ -e "$here/sbatch.rc" ] || {{ echo "Submitted batch job $number"; exit 0; }} ;;
esac
cat "$answer.out" 2>/dev/null
cat "$answer.err" >&2 2>/dev/null
exit "$(cat "$answer.rc" 2>/dev/null || echo 0)"
"""
SITE = """\
launcher: slurm
store: runs
partition: gpu
gpu_types: {a100: {gres: "gpu:a100:1"}}
gpu: a100
cpus: 4
memory_gb: 32
time: "24:00:00"
grace_seconds: 120
"""
EXPERIMENT = """\
pipeline: medical_qa
matrix: {train.seed: {one: 1, two: 2, three: 3}}
model:
  source: random
  config: {model_type: qwen2, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64}
  tokenizer_vocab: 300
data: {path: rows.csv, columns: {question: ask, answer: answer}}
"""


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Site:
    """A project's folder with one experiment, `trial`, and one site, `here`; and a stub Slurm."""

    home: Path
    slurm: Path

    def describe(self, more: str = "", *, instead: str = SITE) -> None:
        (self.home / "launch" / "here.yaml").write_text(instead + more, encoding="utf-8")

    def __call__(self, *words: str) -> Ended:
        """`baton …` on the site, as `main` ends it."""
        # A process of its own: submitit sets up logging for the whole process it is imported in.
        ended = subprocess.run(
            [sys.executable, "-m", "baton", *words], capture_output=True, text=True, check=False
        )
        before, found, error = ended.stderr.partition("error: ")
        err = error.replace("\nerror: ", "\n").rstrip("\n") if found else before
        return Ended(ended.returncode, self.plain(ended.stdout), self.plain(err))

    def answer(self, name: str, out: str = "", *, err: str = "", status: int = 0) -> None:
        """What a command says from now on."""
        (self.slurm / f"{name}.out").write_text(out)
        (self.slurm / f"{name}.err").write_text(err)
        if status:
            (self.slurm / f"{name}.rc").write_text(str(status))
        else:
            (self.slurm / f"{name}.rc").unlink(missing_ok=True)

    def calls(self, command: str) -> list[str]:
        path = self.slurm / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{command} ")]

    def submissions(self) -> list[dict[str, object]]:
        paths = sorted(self.home.glob("runs/**/submissions/*.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def script(self, number: int) -> str:
        """The script that sbatch was given for a job."""
        return self.plain((self.slurm / f"submitted-{number}.sh").read_text())

    def task_folder(self, task: str) -> Path:
        [folder] = self.home.glob(f"runs/**/tasks/{task}")
        return folder

    def plain(self, text: str) -> str:
        """Text without what differs from machine to machine."""
        return text.replace(str(self.home), "HOME").replace(os.sys.executable, "PYTHON")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    home, slurm = tmp_path / "home", tmp_path / "slurm-commands"
    for folder in (home / "jobs", home / "launch", home / "slurm", slurm):
        folder.mkdir(parents=True)
    (home / "slurm" / "leg.sh").write_text("")
    (home / "jobs" / "trial.yaml").write_text(EXPERIMENT)
    (home / "rows.csv").write_text("ask,answer\na,b\n")
    for command in COMMANDS:
        path = slurm / command
        path.write_text(STUB.format(folder=slurm))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (slurm / "number").write_text("70")
    found = Site(home, slurm)
    found.describe()
    found.answer("test-only", err="sbatch: Job 9 to start at T using 4 processors on nodes n1\n")
    monkeypatch.setenv("BATON_HOME", str(home))
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    for name in ("HF_TOKEN", "BATON_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(home)
    return found
