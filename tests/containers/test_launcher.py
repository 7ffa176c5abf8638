"""Tasks as containers, taken away in every way an engine has; compared with the virtual env's."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import (
    CANARY,
    IMAGE,
    REPOSITORY,
    Docker,
    Project,
    assert_no_step_twice,
    assert_same,
    until,
)

pytestmark = pytest.mark.slow
SMOKE = "smoke/medical_qa/lora_20k"


def test_the_smoke_task_stopped_in_the_middle_goes_on_in_a_new_container_bit_identical(
    project: Project, docker: Docker, reference: Callable[[str], Path]
) -> None:
    submit = project.start("submit", SMOKE, "--site", "cpu")
    project.reaches("lora_20k", 3)
    [first] = project.containers()
    docker.must("stop", first)
    out, err = submit.communicate(timeout=200)

    assert submit.returncode == 0, out + err
    legs = project.legs("lora_20k")
    assert [leg["state"] for leg in legs] == ["handed_over", "finished"]
    assert [leg["exit_status"] for leg in legs] == [75, 0]
    assert out.count("started as baton-lora_20k-") == 2
    digest = docker.must("image", "inspect", "--format", "{{.Id}}", IMAGE)
    commit = docker.must(
        "image", "inspect", "--format",
        '{{index .Config.Labels "org.opencontainers.image.revision"}}', IMAGE,
    )  # fmt: skip
    for leg in legs:
        assert leg["environment"] == {"image": f"{IMAGE}@{digest}", "commit": commit}
    assert "handed over" in out
    assert "SIGTERM asked to stop" in out
    assert_same(project.task("lora_20k"), reference(SMOKE))
    assert_no_step_twice(project.task("lora_20k"))
    log = project.log("lora_20k")
    assert log.count("leg ended") == 2
    assert log.count("stage started task=lora_20k leg=1 stage=data") == 1
    assert project.containers() == []
    assert docker.must("ps", "--all", "--quiet", "--filter", "label=baton.task") == ""


def test_a_killed_container_and_a_killed_launcher_lose_no_step_and_no_line(
    project: Project, docker: Docker, reference: Callable[[str], Path]
) -> None:
    task = "long"
    launcher = project.start("submit", "long/long", "--site", "cpu")
    project.reaches(task, 120)
    [first] = project.containers()
    docker.must("kill", first)  # SIGKILL: nobody had the time to say a word
    second = until(lambda: [c for c in project.containers() if c != first], "another container")[0]
    until(lambda: project.status("long")[task]["state"] == "running", "the second leg")

    # The launcher goes without a word; its container stays, and status finds it.
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    row = until(
        lambda: (r := project.status("long")[task])["state"] == "unattended" and r,
        "status to notice that nobody watches",
    )
    assert row["job"].startswith("baton-long-")
    assert "submit again" in row["reason"]
    project.reaches(task, 150)

    # The next submission watches the same container, whose leg nobody interrupted.
    ended = project("submit", "long/long", "--site", "cpu")
    assert ended.status == 0, ended.out + ended.err
    assert "runs already" in ended.out
    legs = project.legs(task)
    assert [leg["state"] for leg in legs] == ["lost", "finished"]
    begun = legs[1]["from_step"]
    assert begun >= 100
    assert second not in project.containers()
    assert_same(project.task(task), reference("long/long"))
    assert_no_step_twice(project.task(task))
    log = project.log(task)
    steps = re.findall(r" step task=long leg=2 stage=train step=(\d+)/400 ", log)
    # An evaluation saves too, at a step that need not be logged.
    wanted = [str(step) for step in range(begun + 1, 401) if step % 10 == 0]
    assert steps == wanted, "a line was lost or copied twice"
    assert log.count("leg ended") == 1


def test_what_ended_while_nobody_watched_is_told_and_taken_up(
    project: Project, docker: Docker
) -> None:
    launcher = project.start("submit", "long/long", "--site", "cpu")
    project.reaches("long", 60)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    [container] = project.containers()
    docker.must("stop", container)

    row = project.status("long")["long"]
    assert row["state"] == "handed over"
    assert "its container ended (75) and nobody watched: submit again" in row["reason"]

    # Ctrl-C of a launcher: its tasks save and it ends in 75; nothing is left behind.
    second = project.start("submit", "long/long", "--site", "cpu")
    until(lambda: len(project.legs("long")) == 2, "the second leg")
    project.reaches("long", 150)
    second.send_signal(signal.SIGINT)
    out, err = second.communicate(timeout=100)
    assert second.returncode == 75, out + err
    assert [leg["state"] for leg in project.legs("long")] == ["handed_over", "handed_over"]
    assert project.log("long").count("leg ended") == 2
    assert docker.must("ps", "--all", "--quiet", "--filter", "label=baton.task") == ""


def test_a_cancelled_task_saves_and_is_not_started_again(project: Project) -> None:
    launcher = project.start("submit", "long/long", "--site", "cpu")
    project.reaches("long", 60)
    ended = project("cancel", "long/long", "--site", "cpu")
    assert ended.status == 0, ended.err
    assert "was asked to stop; its work is saved" in ended.out
    out, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == 78, out
    [leg] = project.legs("long")
    assert leg["state"] == "cancelled"
    assert leg["durable_step"] >= 60


def test_secrets_reach_the_task_and_stand_in_no_argument_label_record_or_log(
    project: Project, docker: Docker, tmp_path: Path
) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"SECOND_TOKEN={CANARY}2\n", encoding="utf-8")
    secrets.chmod(0o600)
    project.site("secret", f"env: [HF_TOKEN, NOT_SET_ANYWHERE]\nenv_file: {secrets}\n")
    launcher = project.start("submit", "long/long", "--site", "secret", HF_TOKEN=CANARY)
    seen: list[bytes] = []

    def arguments() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            if b"docker" in words and b"baton-long-" in words:
                seen.append(words)
        return bool(project.containers())

    until(arguments, "the container")
    [container] = project.containers()
    found = json.loads(docker.must("inspect", container))[0]
    assert f"HF_TOKEN={CANARY}" in found["Config"]["Env"]
    assert f"SECOND_TOKEN={CANARY}2" in found["Config"]["Env"]
    assert not any(name.startswith("NOT_SET") for name in found["Config"]["Env"])
    assert CANARY not in json.dumps(found["Config"]["Labels"])
    assert CANARY not in json.dumps(found["Args"])
    project.reaches("long", 10)
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 75
    assert seen, "the client was not caught at work"
    assert not any(CANARY.encode() in words for words in seen)
    assert CANARY not in out + err
    for path in project.store.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path

    # A file that others can read is refused before anything starts.
    secrets.chmod(0o644)
    ended = project("submit", "long/long", "--site", "secret")
    assert ended.status == 78
    assert ended.err == f"error: env_file: others can read {secrets}: chmod 600 {secrets}\n"


def test_a_failing_task_is_given_up_after_its_retries(project: Project) -> None:
    (project.home / "jobs" / "small.yaml").write_text(
        (project.home / "jobs" / "long.yaml")
        .read_text(encoding="utf-8")
        .replace("{long: 1, other: 2}", "{small: 1}"),
        encoding="utf-8",
    )
    # Too little memory to import torch: the engine kills the container before it has a record.
    project.site("tight", "memory_gb: 0.05\nretries: 1\nflags: [--memory-swap=52m]\n")
    ended = project("submit", "small", "--site", "tight")
    assert ended.status == 1, ended.out + ended.err
    assert ended.out.count("killed by SIGKILL (out of memory: memory_gb 0.05") == 2
    assert "given up after 2 failures" in ended.out


def test_a_store_in_a_volume_of_an_engine_behind_ssh(
    project: Project, docker: Docker, reference: Callable[[str], Path], tmp_path: Path
) -> None:
    # `ssh` as the docker client calls it, ending on this machine: what it runs there is real.
    bin = tmp_path / "bin"
    bin.mkdir()
    ssh = bin / "ssh"
    ssh.write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/ssh.txt\nwhile [ "$1" != docker ]; do shift; done\n'
        f'DOCKER_HOST=unix://{docker.socket} exec "$@"\n',
        encoding="utf-8",
    )
    ssh.chmod(0o755)
    elsewhere = {"DOCKER_HOST": "ssh://root@rented.example", "PATH": f"{bin}:{_path(docker)}"}

    # A folder of this machine is nothing to that engine.
    ended = project("submit", SMOKE, "--site", "cpu", **elsewhere)
    assert ended.status == 78
    assert "which the engine at ssh://root@rented.example cannot see" in ended.err

    docker("volume", "rm", "baton-test-runs")  # of an earlier run on this engine
    project.site("rented", "volume: baton-test-runs\ncache: baton-test-cache\n")
    ended = project("submit", SMOKE, "--site", "rented", **elsewhere)
    assert ended.status == 0, ended.out + ended.err
    assert "-l root -- rented.example" in (tmp_path / "ssh.txt").read_text(encoding="utf-8")
    folder = project.task("lora_20k")
    assert not (folder / "train" / "checkpoints").exists(), "checkpoints stay in the volume"
    other = reference(SMOKE)
    for name in ("train/metrics.jsonl", "eval/predictions.jsonl", "data/test.jsonl"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    row = project.status(SMOKE, "local")["lora_20k"]
    assert row["state"] == "finished"
    assert project.log("lora_20k").count("stage finished") == 3
    legs = project.legs("lora_20k")
    assert legs[-1]["state"] == "finished"
    # Somebody else's `status`, without these records, brings them.
    shutil.rmtree(folder / "legs")
    (folder / "eval" / "done.json").unlink()
    words = ("status", SMOKE, "--json", "--site", "rented")
    [row] = json.loads(project(*words, **elsewhere).out)
    assert row["state"] == "finished"
    assert row["durable_step"] == 20
    assert project.legs("lora_20k") == legs
    # The image's own user wrote it: nothing there belongs to root.
    mount = (
        "--volume",
        "baton-test-runs:/runs",
        "--entrypoint",
        "find",
        IMAGE,
        "/runs",
        "-mindepth",
        "1",
    )
    assert docker.must("run", "--rm", "--network", "none", *mount, "-user", "root") == ""


def test_what_is_written_into_a_folder_belongs_to_who_submits(
    project: Project, docker: Docker
) -> None:
    project.site("nobody", "user: 12345:23456\n")
    project.store.mkdir()
    os.chmod(project.store, 0o777)
    words = ("run", "--rm", "--network", "none", "--user", "12345:23456")
    mount = ("--mount", f"type=bind,source={project.store},target=/runs")
    ended = docker(*words, *mount, IMAGE, "run", "smoke/medical_qa/lora_20k", "--stage", "data")
    assert ended.status == 0, ended.out + ended.err
    owners = {(p.stat().st_uid, p.stat().st_gid) for p in project.store.rglob("*")}
    assert owners == {(12345, 23456)}


def test_gpus_are_shared_out_and_asked_of_the_engine(project: Project, docker: Docker) -> None:
    project.site("gpus", "")
    path = project.home / "launch" / "gpus.yaml"
    text = path.read_text(encoding="utf-8").replace("gpus: none", "gpus: [0, 3]")
    path.write_text(text, encoding="utf-8")
    ended = project("submit", "long", "--site", "gpus", "--dry-run")
    assert """--gpus '"device=0"'""" in ended.out

    launcher = project.start("submit", "long", "--site", "gpus")
    both = until(lambda: len(c := project.containers()) == 2 and c, "two containers at once")
    asked = [json.loads(docker.must("inspect", c))[0]["HostConfig"]["DeviceRequests"] for c in both]
    assert sorted(request[0]["DeviceIDs"] for request in asked) == [["0"], ["3"]]
    assert "prestart" in (docker.folder / "gpu-hook.log").read_text(encoding="utf-8")
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=100)
    assert launcher.returncode == 75


def test_the_commands_say_what_is_wrong_with_site_or_engine(project: Project) -> None:
    project.site("typo", "gpu: 1\n")
    ended = project("submit", "long", "--site", "typo")
    assert ended.status == 78
    assert "did you mean" in ended.err

    project.site("missing", "")
    path = project.home / "launch" / "missing.yaml"
    path.write_text(
        path.read_text(encoding="utf-8").replace("baton:cpu", "localhost:1/none:0"), "utf-8"
    )
    ended = project("submit", "long", "--site", "missing")
    assert ended.status == 1
    assert ended.err.startswith("error: docker pull: the registry does not answer:")

    ended = project("submit", "long", "--site", "cpu", DOCKER_HOST="unix:///nowhere.sock")
    assert ended.status == 1
    assert "the engine does not answer" in ended.err

    ended = project("doctor", "--site", "cpu")
    assert ended.status == 0, ended.out
    assert "ok    engine: Docker" in ended.out
    assert "ok    image: baton:cpu@sha256:" in ended.out


def _path(docker: Docker) -> str:
    return docker.environment["PATH"]


def test_the_sites_that_come_with_baton_are_read() -> None:
    from baton.config.docker_site import DockerSite
    from baton.config.site import load_site

    for name in ("docker", "rented-gpu"):
        assert (REPOSITORY / "launch" / f"{name}.yaml").is_file()
        site = load_site(name)
        assert isinstance(site, DockerSite)
        assert not site.flags
