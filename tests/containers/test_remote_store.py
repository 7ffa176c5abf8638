"""Containers whose store is behind a network: an engine that is emptied, a launcher, a doctor."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import (
    CANARY,
    IMAGE,
    REPOSITORY,
    Docker,
    Ended,
    Project,
    assert_no_step_twice,
    assert_same,
    products,
    until,
)

sys.path.insert(0, str(REPOSITORY / "tests" / "services"))
from s3 import BUCKET, S3Server, s3_server

pytestmark = pytest.mark.slow
NAMES = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL"
VOLUME, NAME = "baton-test-machine", "baton-test-rented"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        yield started


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{os.urandom(4).hex()}"


def keys(server: S3Server, url: str) -> list[str]:
    """What lies below `url`, in order."""
    client: Any = server.client()
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return sorted(found["Key"] for page in pages for found in page.get("Contents", ()))


def newest_step(server: S3Server, url: str) -> int:
    """The newest checkpoint in the bucket; 0 while there is none."""
    steps = re.findall(r"step-(\d+)/manifest\.json", "\n".join(keys(server, url)))
    return max(map(int, steps), default=0)


def legs(server: S3Server, url: str) -> list[dict[str, Any]]:
    client: Any = server.client()
    return [
        json.loads(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        for key in keys(server, url)
        if "/legs/" in key
    ]


def test_the_line_for_a_rented_gpu_is_repeated_on_empty_machines_until_it_is_done(
    docker: Docker,
    image: Ended,
    server: S3Server,
    url: str,
    tmp_path: Path,
    project: Project,
    reference: Callable[[str], Path],
) -> None:
    """`docker run … run EXP --task T --store s3://…`, again on machines that have nothing."""
    variables = [word for name in server.environment for word in ("--env", name)]
    experiment = (
        f"type=bind,source={project.home / 'jobs' / 'long.yaml'},target=/long.yaml,readonly"
    )
    line = ["--init", "--network", "host", *variables, "--env", "OMP_NUM_THREADS=1"]
    line += ["--mount", f"type=volume,source={VOLUME},target=/cache", "--mount", experiment]
    line += [IMAGE, "run", "/long.yaml", "--task", "long", "--store", url]
    names = docker.environment | server.environment

    def new_machine() -> None:
        docker("rm", "--force", NAME)
        docker("volume", "rm", "--force", VOLUME)
        docker.must("run", "--detach", "--name", NAME, *line, environment=names)

    try:
        new_machine()
        until(lambda: newest_step(server, url) >= 50, "a checkpoint in the bucket")
        docker.must("stop", "--time", "100", NAME)
        assert docker.must("wait", NAME) == "75"
        [leg] = legs(server, url)
        assert (leg["state"], leg["not_stored"]) == ("handed_over", [])
        handed_over = newest_step(server, url)
        assert handed_over == leg["to_step"] < 400

        new_machine()
        until(lambda: newest_step(server, url) > handed_over, "the second machine to get further")
        docker.must("kill", NAME)

        # Nobody said that the second one is gone: the third waits until it counts as lost.
        new_machine()
        assert docker.must("wait", NAME, seconds=400) == "0", docker("logs", NAME).out
        said = docker("logs", NAME).out
        assert "resumed task=long leg=3" in said
        states = [leg["state"] for leg in legs(server, url)]
        assert states == ["handed_over", "lost", "finished"]
    finally:
        docker("rm", "--force", NAME)
        docker("volume", "rm", "--force", VOLUME)
    copied = project("store", "cp", url, str(tmp_path / "copy"), store=None, **server.environment)
    assert copied.status == 0, copied.err
    [folder] = (tmp_path / "copy").glob("**/tasks/long")
    assert_same(folder, reference("long/long"))
    assert_no_step_twice(folder)


def test_a_launcher_with_a_store_behind_a_network(
    project: Project,
    docker: Docker,
    server: S3Server,
    url: str,
    tmp_path: Path,
    reference: Callable[[str], Path],
) -> None:
    project.site("far", f"env: [{NAMES}]\ncache: baton-test-cache\n")
    away = {"store": url, **server.environment, "BATON_SCRATCH": str(tmp_path / "here")}
    project.store = tmp_path / "here"

    ended = project("doctor", "--site", "far", **away)
    assert ended.status == 0, ended.out
    assert f"ok    store: a container reaches {url}" in ended.out

    ended = project("submit", "long/long", "--site", "far", "--dry-run", **away)
    assert f"/plan.json --task long --store {url}" in ended.out
    assert server.environment["AWS_SECRET_ACCESS_KEY"] not in ended.out

    submit = project.start("submit", "long/long", "--site", "far", **away)
    project.reaches("long", 60)
    [first] = docker.must("ps", "--quiet", "--filter", "label=baton.task=long").split()
    docker.must("stop", first)
    until(lambda: len(project.legs("long")) == 2, "the second leg")
    # The launcher goes without a word; its container goes on, and status finds it.
    submit.send_signal(signal.SIGKILL)
    submit.wait()
    [row] = json.loads(project("status", "long/long", "--json", "--site", "far", **away).out)
    assert row["state"] == "unattended"
    ended = project("submit", "long/long", "--site", "far", **away)
    assert ended.status == 0, ended.out + ended.err
    assert "runs already" in ended.out
    assert [leg["state"] for leg in project.legs("long")] == ["handed_over", "finished"]
    assert project.log("long").count("leg ended") == 2
    assert docker.must("ps", "--all", "--quiet", "--filter", "label=baton.task") == ""

    # Somebody else's machine: results, status and log with nothing but the URL.
    elsewhere = {**away, "BATON_SCRATCH": str(tmp_path / "elsewhere")}
    results = tmp_path / "results"
    ended = project("collect", "long/long", "--out", str(results), **elsewhere)
    assert ended.status == 0, ended.err
    assert (results / "report.html").is_file()
    [log] = (tmp_path / "elsewhere").glob("**/tasks/long/log.txt")
    assert log.read_text(encoding="utf-8").count("leg ended") == 2
    copied = project("store", "cp", url, str(tmp_path / "copy"), **{**away, "store": None})
    assert copied.status == 0, copied.err
    [folder] = (tmp_path / "copy").glob("**/tasks/long")
    assert products(folder) == products(reference("long/long"))


def test_a_task_with_a_store_behind_a_network_is_cancelled_for_every_machine(
    project: Project, server: S3Server, url: str, tmp_path: Path
) -> None:
    project.site("far", f"env: [{NAMES}]\ncache: baton-test-cache\n")
    away = {"store": url, **server.environment, "BATON_SCRATCH": str(tmp_path / "here")}
    project.store = tmp_path / "here"
    launcher = project.start("submit", "long/long", "--site", "far", **away)
    project.reaches("long", 60)
    ended = project("cancel", "long/long", "--site", "far", **away)
    assert ended.status == 0, ended.err
    out, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 78, out + err
    [leg] = project.legs("long")
    assert leg["exit_status"] in (75, 78)
    assert leg["durable_step"] >= 60
    shutil.rmtree(tmp_path / "here")
    ended = project("run", "long/long", **away)
    assert ended.status == 78
    assert "was cancelled" in ended.err


def test_what_a_container_lacks_to_reach_its_store_is_said(
    project: Project, server: S3Server, url: str, tmp_path: Path
) -> None:
    project.site("bare", "env: [AWS_REGION, AWS_ENDPOINT_URL]\n")
    away = {"store": url, **server.environment, "BATON_SCRATCH": str(tmp_path / "here")}
    ended = project("doctor", "--site", "bare", **away)
    assert ended.status == 78, ended.out
    assert "there are no credentials; set AWS_ACCESS_KEY_ID" in ended.out
    assert CANARY not in ended.out
