"""`baton doctor`: what stands between a site file and a task that runs there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PARTITION = (
    "PartitionName={name} Default={default} GraceTime={grace} MaxTime={limit} PreemptMode={mode}"
    " State={state} TotalNodes=4\n"
)
GOOD = """\
ok    store: HOME/runs can be written from here
ok    leg.sh: HOME/slurm/leg.sh
ok    python: PYTHON has baton VERSION
ok    slurm: slurm-wlm 22.05.8
ok    account: lab
ok    qos: long
ok    partition gpu: up, 4 nodes
ok    partition gpu: a preempted job gets 150 s, grace_seconds is 120
ok    gpu a100: gpu has nodes with 1 x gpu:a100
ok    requeue: auto, JobRequeue=1
ok    array: up to 1,000 tasks in one submission (MaxArraySize)
ok    sbatch --test-only: would start at T using 4 processors on nodes n1
"""


def partition(name: str = "gpu", **changes: Any) -> str:
    values = {"default": "NO", "grace": 120, "limit": "2-00:00:00", "mode": "REQUEUE"}
    return PARTITION.format(**values | {"state": "UP"} | changes, name=name)


def config(**changes: str) -> str:
    values = {
        "JobRequeue": "1",
        "KillWait": "30 sec",
        "MaxArraySize": "1001",
        "PreemptType": "preempt/partition_prio",
    }
    return "".join(f"{key:<24}= {value}\n" for key, value in (values | changes).items())


@pytest.fixture
def cluster(site: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A site for which everything is there."""
    site.describe("account: lab\nqos: long\nenv: [PYTHONPATH]\n")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "src"))
    site.answer("config", config())
    site.answer("partition", partition() + partition("cpu", default="YES"))
    site.answer("sacctmgr", "lab|normal,long|lab\nother|normal|lab\n")
    site.answer("sinfo", "gpu:a100:8(S:0-1)|a100,ib\n(null)|cpu\n")
    return site


def examine(site: Any) -> tuple[int, str]:
    ended = site("doctor", "--site", "here")
    lines = [
        line.partition(" baton ")[0] + " baton VERSION" if line.startswith("ok    python") else line
        for line in ended.out.splitlines(keepends=False)
    ]
    return ended.status, "\n".join(lines) + "\n"


def said(site: Any, *, status: int) -> list[str]:
    """The lines that are not `ok`."""
    found, text = examine(site)
    assert found == status, text
    return [line for line in text.splitlines() if not line.startswith("ok ")]


def test_a_site_where_all_is_well(cluster: Any) -> None:
    assert examine(cluster) == (0, GOOD)
    assert not list(cluster.home.glob("runs/*")), "it leaves nothing behind"


def test_without_slurm_there_is_nothing_to_ask(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    [line] = said(cluster, status=78)
    assert line == (
        "wrong slurm: not on this machine: sbatch, squeue, scancel, scontrol, sacct, srun; run"
        " this on a login node of the cluster"
    )


def test_a_controller_that_does_not_answer_is_no_mistake_of_the_site(cluster: Any) -> None:
    cluster.answer("config", err="slurm_load_ctl_conf error: Unable to contact slurm", status=1)
    [line] = said(cluster, status=1)
    assert line.startswith("mend  slurm: scontrol: ")
    assert "scontrol ping" in line


@pytest.mark.parametrize(
    ("answers", "status", "lines"),
    [
        (
            {"partition": partition("main")},
            78,
            ["wrong partition: there is no 'gpu'; there are: main"],
        ),
        (
            {"partition": partition(state="DOWN")},
            1,
            ["mend  partition gpu: is DOWN; jobs would wait"],
        ),
        (
            {"partition": partition(limit="01:00:00")},
            78,
            ["wrong partition gpu: allows 01:00:00; shorten `time`"],
        ),
        (
            {"partition": partition(grace=0)},
            0,
            [
                "note  partition gpu: a preempted job gets 30 s (GraceTime + KillWait), less than"
                " grace_seconds 120: a save must fit into 30 s, or the leg goes back to its last"
                " checkpoint; ask for a longer GraceTime, or save more often"
            ],
        ),
        (
            {"partition": partition(mode="CANCEL")},
            0,
            [
                "note  partition gpu: PreemptMode=CANCEL: Slurm itself ends a preempted job; leg.sh"
                " starts it again when it was asked in time, a killed leg waits for a person"
            ],
        ),
        ({"sacctmgr": "other|normal|other\n"}, 78, [
            "wrong account: 'lab' is not yours; you have: other",
            "wrong qos: 'long' is not yours; you have: normal",
        ]),
        ({"sinfo": "gpu:v100:8|ib\n"}, 78, [
            "wrong gpu a100: gpu has no node with 1 x gpu:a100; it has gpu:v100:8"
        ]),
    ],
    ids=["partition", "down", "time", "grace", "cancel", "account", "gpu"],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_mend(
    cluster: Any, answers: dict[str, str], status: int, lines: list[str]
) -> None:
    for name, text in answers.items():
        cluster.answer(name, text)
    assert said(cluster, status=status) == lines


def test_a_verdict_of_sbatch_counts(cluster: Any) -> None:
    cluster.answer("test-only", err="allocation failure: Invalid feature specification", status=1)
    [line] = said(cluster, status=78)
    assert line.startswith("wrong sbatch --test-only: sbatch: Invalid feature specification.")
    assert "`constraint`" in line


def test_an_interpreter_without_baton_is_found(cluster: Any, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'baton'\" >&2; exit 1\n"
    )
    python.chmod(0o755)
    cluster.describe(f"account: lab\nvenv: {tmp_path / 'venv'}\n")
    [line] = said(cluster, status=78)
    assert line == (
        f"wrong python: {python}: ModuleNotFoundError: No module named 'baton'; install baton"
        " there, or name another `venv`"
    )


def test_a_runtime_and_an_image_that_are_not_here_are_found(cluster: Any) -> None:
    cluster.describe("account: lab\nruntime: apptainer\nimage: /images/none.sif\n")
    first, second = said(cluster, status=78)
    assert first.startswith("note  runtime: no apptainer on this machine; if the nodes have none")
    assert second == "wrong image: there is no file /images/none.sif"


def test_pyxis_is_looked_for_in_srun(cluster: Any) -> None:
    cluster.describe("account: lab\nruntime: pyxis\nimage: nvcr.io#x\n")
    [line] = said(cluster, status=78)
    assert line.startswith("wrong runtime: srun takes no --container-image")
    cluster.answer("srun", "  --container-image=…\n")
    assert said(cluster, status=0) == []


def test_a_file_of_secrets_that_others_can_read_is_found(cluster: Any, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    cluster.describe(f"account: lab\nenv: [PYTHONPATH]\nenv_file: {secrets}\n")
    assert said(cluster, status=78) == [f"wrong env_file: there is no file {secrets}"]
    secrets.write_text("HF_TOKEN=x\n")
    secrets.chmod(0o644)
    assert said(cluster, status=1) == [
        f"mend  env_file: others can read {secrets}: chmod 600 {secrets}"
    ]
    secrets.chmod(0o600)
    assert said(cluster, status=0) == []


def test_a_store_that_cannot_be_written_is_found(cluster: Any) -> None:
    (cluster.home / "runs").write_text("")
    ended = cluster("doctor", "--site", "here")
    assert ended.status == 78
    assert "is a file; name a folder" in ended.err


def test_the_local_site_is_examined_too(site: Any) -> None:
    (site.home / "launch" / "local.yaml").write_text("launcher: local\n")
    ended = site("doctor")
    assert (ended.status, ended.out) == (0, "ok    store: HOME/runs can be written from here\n")
