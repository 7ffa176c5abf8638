"""Remote stores for handover tests: a server, faults in front of it, and a look inside."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "services"))

from faultproxy import FaultProxy
from lab import Task
from minihub import MiniHub
from s3 import BUCKET, S3Server, s3_server

from baton.pipelines import PIPELINES
from baton.place import Place
from baton.record import Plan
from baton.store.mirror import Mirror

KINDS = ("s3", "hub", "bucket")


@dataclass(frozen=True)
class Far:
    """One remote store server, reached by way of a proxy that can break things."""

    kind: str
    proxy: FaultProxy
    environment: dict[str, str]
    hub: MiniHub | None = None
    s3: S3Server | None = None

    def url(self) -> str:
        """An empty place in it."""
        unique = os.urandom(6).hex()
        return {
            "s3": f"s3://{BUCKET}/{unique}",
            "hub": f"hf://models/tester/{unique}",
            "bucket": f"hf://buckets/tester/{unique}",
        }[self.kind]

    def mirror(self, task: Task, machine: Path | None = None) -> Mirror:
        """The task's two sides, as `machine` (an empty one) sees them."""
        plan = Plan.from_json(task.plan.read_bytes(), where=str(task.plan))
        folder = machine or Path(tempfile.mkdtemp(prefix="empty-machine-"))
        place = replace(Place.open(task.url), root=folder)
        mirror = place.mirror(plan, task.name)
        assert mirror is not None
        return mirror

    def steps(self, task: Task) -> list[int]:
        """Steps that are complete in the store."""
        return self.mirror(task).archive("train/checkpoints").steps()

    def on_empty_machine(self, task: Task, folder: Path) -> Task:
        """All that the store has of a task, brought to an empty folder by the public way."""
        plan = Plan.from_json(task.plan.read_bytes(), where=str(task.plan))
        mirror = self.mirror(task, folder)
        mirror.pull(PIPELINES[plan.pipeline]().stage_names)
        mirror.bring_checkpoints()
        target = folder / plan.experiment / plan.digest / "plan.json"
        target.write_bytes(task.plan.read_bytes())
        return Task(folder, target, task.name)

    def forget(self, url: str) -> None:
        """Remove all that lies at one place of the store: a storm needs no more and more of it."""
        if self.s3 is not None:
            client: Any = self.s3.client()
            prefix = f"{url.removeprefix(f's3://{BUCKET}/')}/"
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
            for key in [found["Key"] for page in pages for found in page.get("Contents", ())]:
                # One by one: Ceph wants an MD5 of a list, which boto3 sends no more.
                client.delete_object(Bucket=BUCKET, Key=key)
            return
        assert self.hub is not None
        self.hub.repositories.pop(("model", url.removeprefix("hf://models/")), None)
        self.hub.buckets.forget(url.removeprefix("hf://buckets/"))

    def keys(self, task: Task, step: int) -> dict[str, str]:
        """Where each file of a remote checkpoint lies, by the file's name."""
        archive = self.mirror(task).archive("train/checkpoints")
        manifest = archive.checkpoints.manifest(step)
        prefix = "/".join((*task.url.partition("://")[2].split("/")[-1:], *_version(task)))
        places = {entry.name: archive.place(step, entry) for entry in manifest.files}
        places["manifest.json"] = archive.checkpoints.name(step, "manifest.json")
        if self.kind != "s3":
            prefix = "/".join(_version(task))
        return {name: f"{prefix}/{place}" for name, place in places.items()}

    def read(self, task: Task, key: str) -> bytes:
        if self.s3 is not None:
            client: Any = self.s3.client()
            return bytes(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        assert self.hub is not None
        if self.kind == "bucket":
            return self.hub.buckets.read(task.url.removeprefix("hf://buckets/"), key)
        repository = self.hub.repository(task.url.removeprefix("hf://models/"))
        return self.hub.bytes_of(repository.commits[repository.head].files[key])

    def damage(self, task: Task, key: str, data: bytes | None) -> None:
        """Put other bytes under a key, behind the store's back; None removes it."""
        if self.s3 is not None:
            client: Any = self.s3.client()
            if data is None:
                client.delete_object(Bucket=BUCKET, Key=key)
            else:
                client.put_object(Bucket=BUCKET, Key=key, Body=data)
            return
        assert self.hub is not None
        if self.kind == "bucket":
            self.hub.buckets.put(task.url.removeprefix("hf://buckets/"), key, data)
            return
        from minihub import Blob

        repository = self.hub.repository(task.url.removeprefix("hf://models/"))
        files = dict(repository.commits[repository.head].files)
        if data is None:
            del files[key]
        else:
            files[key] = Blob(len(data), data)
        repository.add("somebody edits the repository", "", files, repository.head)


def _version(task: Task) -> tuple[str, ...]:
    plan = json.loads(task.plan.read_bytes())
    return (*plan["experiment"].split("/"), plan["digest"])


@contextlib.contextmanager
def far_store(kind: str, folder: Path) -> Iterator[Far]:
    """A server of this kind, told to this process and to the legs it starts."""
    with contextlib.ExitStack() as stack:
        if kind == "s3":
            s3 = stack.enter_context(s3_server())
            proxy = stack.enter_context(FaultProxy("127.0.0.1", s3.port))
            environment = {**s3.environment, "AWS_ENDPOINT_URL": proxy.url}
            far = Far(kind, proxy, environment, s3=s3)
        else:
            hub = stack.enter_context(MiniHub(folder))
            proxy = stack.enter_context(FaultProxy("127.0.0.1", hub.port))
            environment = {**hub.environment, "HF_ENDPOINT": proxy.url}
            environment["BATON_HUB_COMMITS_PER_HOUR"] = "1000000"
            far = Far(kind, proxy, environment, hub=hub)
            # What a client sends goes the way of everything else.
            hub.buckets.cas_url = proxy.url
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield far
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
