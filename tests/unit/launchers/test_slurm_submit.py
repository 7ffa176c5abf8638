"""`baton submit` on a Slurm site: one array, nothing secret in it, refusals with advice."""

from __future__ import annotations

import datetime
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_canary0123456789"
SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-2%2
#SBATCH --chdir=HOME
#SBATCH --constraint=a100_80
#SBATCH --cpus-per-task=4
#SBATCH --exclusive
#SBATCH --export=HF_TOKEN
#SBATCH --gres=gpu:a100:2
#SBATCH --job-name=trial/DIGEST/001-TOKEN
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=me@example.org
#SBATCH --mem=33280M
#SBATCH --nice=100
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=HOME/runs/trial/DIGEST/submissions/001/task-%a.log
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=B:USR2@120
#SBATCH --time=24:00:00

# setup
set -eo pipefail
export SLURM_EXPORT_ENV=ALL
export BATON_HOME=HOME
export BATON_STORE=HOME/runs
export BATON_TASKS=@HOME/runs/trial/DIGEST/submissions/001/tasks.txt
export BATON_SCRIPT=HOME/runs/trial/DIGEST/submissions/001/task.sbatch
export BATON_RUNTIME=apptainer
export BATON_IMAGE='/images/baton 1.sif'
export BATON_MOUNTS='/data:/data:ro /scratch'
export BATON_GRACE_SECONDS=120
export BATON_RETRIES=2
export BATON_REQUEUE=auto
export OMP_NUM_THREADS=1
export BATON_SUBMISSION=slurm:trial/DIGEST/001-TOKEN/"$SLURM_ARRAY_TASK_ID"
task=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" HOME/runs/trial/DIGEST/submissions/001/tasks.txt)
folder=HOME/runs/trial/DIGEST/tasks/"$task"
mkdir -p "$folder"
exec >>"$folder"/log.txt 2>&1
module load apptainer

# command
export SUBMITIT_EXECUTOR=slurm
exec bash HOME/slurm/leg.sh HOME/runs/trial/DIGEST/plan.json "$task"
"""
FULL = """\
launcher: slurm
store: runs
partition: gpu
account: lab
qos: long
gpu_types: {a100-80: {gres: "gpu:a100:1", constraint: a100_80}}
gpu: a100-80
gpus_per_task: 2
cpus: 4
memory_gb: 32.5
time: "24:00:00"
max_parallel: 2
mail: me@example.org
exclusive: true
flags: [--nice=100]
env: [HF_TOKEN]
runtime: apptainer
image: /images/baton 1.sif
mounts: [/data:/data:ro, /scratch]
setup: [module load apptainer]
"""


def plain(text: str) -> str:
    text = re.sub(r"/[0-9a-f]{8}/", "/DIGEST/", text)
    return re.sub(r"/(\d{3})-[0-9a-f]{4}", r"/\1-TOKEN", text)


def finish(site: Any, *tasks: str, stages: tuple[str, ...] = ("data", "train", "eval")) -> None:
    """Make tasks look as finished as a leg leaves them."""
    [plan] = site.home.glob("runs/trial/*/plan.json")
    for task in tasks:
        for stage in stages:
            marker = plan.parent / "tasks" / task / stage / "done.json"
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text("{}")


def in_queue(site: Any, *rows: str) -> None:
    """Rows as `ARRAY|INDEX|STATE|REASON` of the newest submission's first job."""
    [name] = [job["name"] for job in site.submissions()[-1]["jobs"]][:1]
    cells = [row.split("|") for row in rows]
    lines = [f"{a}|{i}|{name}|{state}|N/A|{reason}\n" for a, i, state, reason in cells]
    site.answer("squeue", "".join(lines))


def test_the_script_is_what_the_site_says(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    site.describe(instead=FULL)
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 0, ended.err
    assert plain(site.script(70)) == SCRIPT


def test_a_whole_matrix_is_one_array_with_a_small_record(site: Any) -> None:
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 0, ended.err
    assert len(site.calls("sbatch")) == 1
    [record] = site.submissions()
    assert record["tasks"] == ["one", "two", "three"]
    [job] = record["jobs"]
    assert job["id"] == "70"
    assert "#SBATCH --array=0-2%3\n" in site.script(70)
    assert f"submitted as job 70 ({job['name']})" in ended.out
    tasks = next(site.home.glob("runs/**/tasks.txt"))
    assert tasks.read_text() == "one\ntwo\nthree\n"


def test_no_pickle_travels(site: Any) -> None:
    assert site("submit", "trial", "--site", "here").status == 0
    files = [path for path in site.home.glob("runs/**/*") if path.is_file()]
    assert files
    assert not [path for path in files if path.suffix == ".pkl"]
    assert not [path for path in files if path.read_bytes().startswith(b"\x80")]
    assert "submitit.core" not in site.script(70)


def test_max_parallel_of_the_command_goes_before_the_sites(site: Any) -> None:
    site.describe("max_parallel: 2\n")
    site("submit", "trial", "--site", "here", "--max-parallel", "1")
    assert "--array=0-2%1\n" in site.script(70)


def test_submitting_again_submits_what_is_missing(site: Any) -> None:
    site("submit", "trial", "--site", "here")
    finish(site, "one")
    in_queue(site, "70|1|PENDING|Priority")
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 0, ended.err
    assert "1 of 3 tasks to run" in ended.out
    assert "two: pending already, left alone" in ended.out
    assert [record["tasks"] for record in site.submissions()] == [
        ["one", "two", "three"],
        ["three"],
    ]
    assert "#SBATCH --array=0-0%1\n" in site.script(71)


def test_nothing_is_submitted_where_everything_is_finished_or_at_work(site: Any) -> None:
    site("submit", "trial", "--site", "here")
    finish(site, "one", "two")
    in_queue(site, "70|2|RUNNING|None")
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 0, ended.err
    assert "0 of 3 tasks to run" in ended.out
    assert len(site.submissions()) == 1


def test_an_element_that_was_submitted_again_by_its_leg_is_still_known(site: Any) -> None:
    """`requeue: resubmit` gives it another number; its name and index stay."""
    site("submit", "trial", "--site", "here")
    in_queue(site, "70|0|RUNNING|None", "70|1|RUNNING|None", "912|2|PENDING|Priority")
    ended = site("submit", "trial", "--site", "here")
    assert "0 of 3 tasks to run" in ended.out


def test_a_secret_is_nowhere_but_in_the_environment(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    site.describe("env: [HF_TOKEN]\n")
    shown = site("submit", "trial", "--site", "here", "--dry-run")
    ended = site("submit", "trial", "--site", "here")
    looked = site("status", "trial", "--site", "here")
    examined = site("doctor", "--site", "here")
    for each in (shown, ended, looked, examined):
        assert TOKEN not in each.out + each.err
    assert TOKEN in (site.slurm / "environment.txt").read_text()
    written = [path for path in site.home.rglob("*") if path.is_file()]
    words = [*written, site.slurm / "calls.txt", site.slurm / "submitted-70.sh"]
    assert not [path for path in words if TOKEN in path.read_text(errors="replace")]


def test_a_secret_in_the_site_file_is_refused(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    site.describe(f"setup: [export HF_TOKEN={TOKEN}]\n")
    for words in ((), ("--dry-run",)):
        ended = site("submit", "trial", "--site", "here", *words)
        assert ended.status == 78
        assert "would hold the value of HF_TOKEN" in ended.err
        assert TOKEN not in ended.out + ended.err
    assert not site.submissions()


def test_without_names_nothing_of_the_environment_travels(site: Any) -> None:
    site("submit", "trial", "--site", "here")
    assert "#SBATCH --export=NONE\n" in site.script(70)


def test_dry_run_shows_script_verdict_tasks_and_price_and_leaves_nothing(site: Any) -> None:
    site.describe("price_per_gpu_hour: 2\n")
    ended = site("submit", "trial", "--site", "here", "--dry-run")
    assert ended.status == 0, ended.err
    assert "array element 2: three" in ended.out
    assert "#SBATCH --array=0-2%3\n" in ended.out
    assert (
        "sbatch --test-only: Job 9 to start at T using 4 processors on nodes n1\n"
        "3 tasks, at most 72.0 GPU-hours (144.00 at the site's price); as much again for each"
        " further leg\nnothing was submitted\n"
    ) in ended.out
    assert not (site.home / "runs").exists()
    assert not [call for call in site.calls("sbatch") if "--test-only" not in call]


def test_dry_run_shows_the_very_script_that_is_submitted(site: Any) -> None:
    shown = site("submit", "trial", "--site", "here", "--dry-run")
    site("submit", "trial", "--site", "here")
    assert site.script(70).rstrip() in shown.out


def test_dry_run_works_where_slurm_is_not(
    site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = site("submit", "trial", "--site", "here", "--dry-run")
    assert ended.status == 0, ended.err
    assert "--test-only: would be refused: there is no sbatch on this machine" in ended.out


REFUSALS = [
    ("invalid partition specified: nope\nX: Invalid partition name specified", 78, "`partition`"),
    ("Invalid account or account/partition combination specified", 78, "`account`"),
    ("Invalid qos specification", 78, "`qos`"),
    ("Requested time limit is invalid (missing or exceeds some limit)", 78, "`time`"),
    ("Invalid feature specification", 78, "`constraint`"),
    ("Invalid generic resource (gres) specification", 78, "`gres`"),
    ("Requested node configuration is not available", 78, "`gpus_per_task`"),
    ("Invalid job array specification", 78, "MaxArraySize"),
    ("Job violates accounting/QOS policy (job submit limit, user's size)", 1, "wait until"),
    ("QOSMaxSubmitJobPerUserLimit", 1, "wait until"),
    ("Unable to contact slurm controller (connect failure)", 1, "scontrol ping"),
    ("fatal: Unable to process configuration file", 78, "login node"),
    ("Something nobody has heard of", 1, "Something nobody has heard of"),
]


@pytest.mark.parametrize(("said", "status", "advice"), REFUSALS, ids=lambda value: str(value)[:25])
def test_a_refusal_of_sbatch_says_what_to_mend_and_leaves_nothing(
    site: Any, said: str, status: int, advice: str
) -> None:
    lines = "\n".join(f"sbatch: error: {line}" for line in said.split("\n"))
    site.answer("sbatch", err=lines, status=1)
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == status
    assert ended.err.startswith("sbatch: ")
    assert advice in ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("\n") == 0
    assert not site.submissions()


def test_without_sbatch_the_advice_is_a_login_node(
    site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 78
    assert ended.err == (
        "there is no sbatch on this machine: run baton on a login node of the cluster, or choose"
        " another --site"
    )


def test_nothing_is_submitted_while_the_queue_cannot_be_read(site: Any) -> None:
    """It could be there already: two arrays would work on the same tasks."""
    site("submit", "trial", "--site", "here")
    site.answer("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", status=1)
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 1
    assert "the controller does not answer" in ended.err
    assert len(site.submissions()) == 1


def test_two_submissions_at_once_become_one(site: Any) -> None:
    site("submit", "trial", "--site", "here")
    [path] = site.home.glob("runs/**/submissions/001.json")
    record = json.loads(path.read_bytes())
    record["jobs"][0]["id"] = ""
    record["submitted"] = datetime.datetime.now(datetime.UTC).isoformat()
    path.write_text(json.dumps(record))
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 1
    assert "another `baton submit` of this experiment is under way" in ended.err
    assert len(site.calls("sbatch")) == 1


def test_a_submission_that_was_killed_half_way_does_not_block_the_next(site: Any) -> None:
    site("submit", "trial", "--site", "here")
    [path] = site.home.glob("runs/**/submissions/001.json")
    record = json.loads(path.read_bytes())
    record["jobs"][0]["id"] = ""
    record["submitted"] = "2026-01-01T00:00:00.000+00:00"
    path.write_text(json.dumps(record))
    # Its job did reach Slurm: found by its name.
    in_queue(site, "70|0|RUNNING|None")
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 0, ended.err
    assert site.submissions()[-1]["tasks"] == ["two", "three"]


CHAIN = """\
stages:
  data: {partition: cpu, gpus_per_task: 0, cpus: 2, time: "1:00:00"}
  eval: {time: "2:00:00"}
collect: true
"""


def test_stages_become_jobs_that_wait_element_by_element(site: Any) -> None:
    site.describe(CHAIN)
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 0, ended.err
    data, train, evaluation, collect = map(site.script, (70, 71, 72, 73))
    assert "export BATON_STAGE=data\n" in data
    assert "--partition=cpu" in data
    assert "--gres" not in data
    assert "--dependency" not in data
    assert "#SBATCH --dependency=aftercorr:70\n" in train
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in train
    assert "export BATON_STAGE=train\n" in train
    assert "#SBATCH --gres=gpu:a100:1\n" in train
    assert "#SBATCH --dependency=aftercorr:71\n" in evaluation
    assert "#SBATCH --time=2:00:00\n" in evaluation
    assert "#SBATCH --dependency=afterany:72\n" in collect
    assert "#SBATCH --array=0-0%1\n" in collect
    assert re.search(r"exec PYTHON -m baton collect HOME/runs/trial/\w+/plan.json\n", collect)
    [record] = site.submissions()
    assert [(job["id"], job["stage"]) for job in record["jobs"]] == [
        ("70", "data"),
        ("71", "train"),
        ("72", "eval"),
        ("73", "collect"),
    ]


def test_one_named_stage_splits_the_chain_around_it(site: Any) -> None:
    site.describe("stages: {data: {cpus: 2}}\n")
    site("submit", "trial", "--site", "here")
    stages = [job["stage"] for job in site.submissions()[0]["jobs"]]
    assert stages == ["data", "eval"]


def test_an_experiment_may_split_its_stages_itself(site: Any) -> None:
    whole = site("submit", "trial", "--site", "here", "--dry-run").out
    ended = site("submit", "trial", "--site", "here", "--set", "split=[data, eval]")
    assert ended.status == 0, ended.err
    data, train, evaluation = map(site.script, (70, 71, 72))
    assert [job["stage"] for job in site.submissions()[0]["jobs"]] == ["data", "train", "eval"]
    assert "--gres" not in data, "preparing data needs no GPU"
    assert "#SBATCH --gres=gpu:a100:1\n" in train
    assert "#SBATCH --dependency=aftercorr:70\n" in train
    assert "#SBATCH --gres=gpu:a100:1\n" in evaluation
    [plan] = site.home.glob("runs/trial/*/plan.json")
    assert plan.parent.name in whole, "how jobs are cut is no part of what is computed"
    # The plan is frozen now; the next submission may cut it in another way all the same.
    site("submit", "trial", "--site", "here", "--set", "split=[eval]")
    assert [job["stage"] for job in site.submissions()[1]["jobs"]] == ["train", "eval"]


def test_a_split_at_a_stage_that_there_is_not_is_refused(site: Any) -> None:
    ended = site("check", "trial", "--set", "split=[data, evaluate]")
    assert ended.status == 78
    assert ended.err == "--set: split: medical_qa has the stages data, train, eval; got 'evaluate'"


def test_a_stage_that_every_task_has_behind_it_gets_no_job(site: Any) -> None:
    site.describe(CHAIN)
    site("submit", "trial", "--site", "here")
    finish(site, "one", "two", "three", stages=("data",))
    site("submit", "trial", "--site", "here")
    stages = [job["stage"] for job in site.submissions()[1]["jobs"]]
    assert stages == ["train", "eval", "collect"]


def test_a_stage_that_the_pipeline_does_not_have_is_refused(site: Any) -> None:
    site.describe("stages: {evaluate: {cpus: 2}}\n")
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 78
    assert ended.err == "stages.evaluate: medical_qa has the stages data, train, eval"


def test_a_chain_that_breaks_while_it_is_submitted_is_taken_back(site: Any) -> None:
    site.describe(CHAIN)
    # From the second on, sbatch refuses.
    stub = (site.slurm / "sbatch").read_text()
    refuse = (
        'grep -q "=aftercorr" "$1" 2>/dev/null && { echo "Job dependency problem" >&2; exit 1; }\n'
    )
    (site.slurm / "sbatch").write_text(stub.replace("case ", f"{refuse}case ", 1))
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 1
    assert site.calls("scancel") == ["scancel 70"]
    assert not site.submissions()


def test_a_later_stage_that_slurm_would_refuse_stops_the_submission(site: Any) -> None:
    """sbatch takes what waits for another job without a look at it."""
    site.describe(CHAIN)
    site.answer("test-only", err="allocation failure: Invalid feature specification", status=1)
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 78
    assert not site.submissions()
    assert not [call for call in site.calls("sbatch") if "--test-only" not in call]


def test_a_grace_shorter_than_a_measured_save_is_said(site: Any) -> None:
    site("submit", "trial", "--site", "here")
    [plan] = site.home.glob("runs/trial/*/plan.json")
    folder = plan.parent / "tasks" / "two" / "legs"
    folder.mkdir(parents=True)
    runner = {"host": "n", "pid": 1, "started_ticks": 1, "boot": "b", "pid_namespace": ""}
    leg = {"task": "two", "number": 1, "state": "handed_over", "runner": runner, "position": [1]}
    leg |= {"started": "2026-01-01T00:00:00.000+00:00", "signal_to_durable_seconds": 200.4}
    (folder / "001.json").write_text(json.dumps({"schema": 1, "notice": ""} | leg))
    said = (
        "warning: saving took 200 s after a signal (leg 1 of two), but grace_seconds is 120: a leg"
        " at its time limit would lose what it did since its last save; raise grace_seconds"
    )
    assert said in site("submit", "trial", "--site", "here", "--dry-run").out
    assert said in site("submit", "trial", "--site", "here").out
    site.describe(instead=FULL.replace("time:", "grace_seconds: 300\ntime:"))
    assert "warning: saving" not in site("submit", "trial", "--site", "here", "--dry-run").out


def test_a_variable_that_is_not_set_is_said(site: Any) -> None:
    site.describe("env: [HF_TOKEN]\n")
    ended = site("submit", "trial", "--site", "here")
    assert "not set here, so the jobs will not have it either: HF_TOKEN" in ended.out


def test_a_drill_is_for_the_local_site(site: Any) -> None:
    ended = site("submit", "trial", "--site", "here", "--drill", "one=TERM@3")
    assert ended.status == 78
    assert ended.err == "--drill is for the local site; on Slurm use `scancel --signal`"


def test_a_thousand_tasks_are_planned_and_submitted_in_ten_seconds(site: Any) -> None:
    seeds = f"--set=matrix.train.seed=[{','.join(map(str, range(1000)))}]"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = site("submit", "trial", "--site", "here", seeds)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not the time on the clock, which depends on what else this machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert ended.status == 0, ended.err
    assert len(site.calls("sbatch")) == 1
    assert "--array=0-999%1000\n" in site.script(70)
    assert len(site.script(70)) < 5000


def test_a_stage_to_run_up_to_must_be_one_of_the_pipelines(site: Any) -> None:
    words = ["run", "trial", "--task", "one", "--site", "here", "--stage", "evaluate"]
    ended = subprocess.run(
        [sys.executable, "-m", "baton", *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 78
    assert ended.stderr == ("error: trial/one has no stage 'evaluate'; it has: data, train, eval\n")


def test_the_launcher_and_doctor_need_no_torch() -> None:
    program = "import sys, baton.launchers.slurm, baton.doctor, baton.launchers.slurm_checks"
    program += (
        "; print([name for name in ('torch', 'transformers', 'rich') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"
