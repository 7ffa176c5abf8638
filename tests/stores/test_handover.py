"""Handovers over a remote store: other machines, kills while things travel, legs too many."""

from __future__ import annotations

import datetime
import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from far import Far
from lab import Lab, Task, assert_identical, damage, wait_for, wait_until

from baton.store.inventory import garbage, verify, versions_in
from baton.store.open import open_remote

MANIFEST = r"step-00000{}/manifest\.json"


def moved(lab: Lab, task: Task) -> Task:
    """The same task of the same store on a machine that has nothing of it yet."""
    other = lab.task(url=task.url)
    other.plan.parent.mkdir(parents=True, exist_ok=True)
    other.plan.write_bytes(task.plan.read_bytes())
    return replace(other, name=task.name)


def test_an_empty_machine_goes_on_with_nothing_but_the_url(
    lab: Lab, far: Far, tmp_path: Path
) -> None:
    here = lab.task(url=far.url())
    leg = lab.start(here)
    stored = int(wait_for(leg, r"stored .* step=(\d+) ")[1])
    leg.kill()
    leg.wait()
    there = moved(lab, here)
    second = lab.run(there)
    resumed = re.search(r"resumed .* step=(\d+)/", second.text)
    assert resumed, second.text[-2000:]
    assert int(resumed[1]) >= stored
    assert_identical(far.on_empty_machine(there, tmp_path / "end"), lab.reference(here))


def test_a_handover_is_in_the_store_before_the_leg_ends(lab: Lab, far: Far, tmp_path: Path) -> None:
    here = lab.task(url=far.url())
    leg = lab.start(here)
    wait_for(leg, r" step=3/10 ")
    leg.kill(signal.SIGTERM)
    assert leg.wait() == 75
    record = here.legs()[-1]
    assert record["state"] == "handed_over"
    assert record["not_stored"] == []
    assert record["durable_step"] == record["to_step"] == far.steps(here)[-1]
    assert record["signal_to_durable_seconds"] > 0
    there = moved(lab, here)
    lab.run(there)
    assert [leg["state"] for leg in there.legs()] == ["handed_over", "finished"]
    assert_identical(far.on_empty_machine(there, tmp_path / "end"), lab.reference(here))


def test_a_grace_too_short_for_the_store_is_told_and_the_machine_itself_loses_nothing(
    lab: Lab, s3: Far, tmp_path: Path
) -> None:
    here = lab.task(url=s3.url())
    later = r"step-0000(0[3-9]|10)/"
    s3.proxy.rule(action="delay", method="PUT", path=later, seconds=60, times=10**6)
    leg = lab.start(here, env={"BATON_GRACE_SECONDS": "4"})
    wait_for(leg, r" saved .* step=4 ")
    started = time.monotonic()
    leg.kill(signal.SIGTERM)
    assert leg.wait() == 75
    assert time.monotonic() - started < 9
    record = here.legs()[-1]
    stored = record["durable_step"] or 0
    assert stored < record["to_step"]
    assert any("step-" in name for name in record["not_stored"]), record
    assert "the grace was too short" in record["reason"]
    s3.proxy.clear()
    second = lab.run(here)
    # The newer copy here wins over the older one in the store.
    assert f"step={record['to_step']}/10" in second.text
    assert_identical(s3.on_empty_machine(here, tmp_path / "end"), lab.reference(here))


def test_a_newer_copy_in_the_store_wins_over_an_older_one_here(
    lab: Lab, s3: Far, tmp_path: Path
) -> None:
    here = lab.task(url=s3.url())
    leg = lab.start(here)
    wait_for(leg, r"stored .* step=2 ")
    leg.kill()
    leg.wait()
    older = max(here.steps())
    there = moved(lab, here)
    leg = lab.start(there)
    wait_for(leg, rf" saved .* step={older + 2} ")
    leg.kill(signal.SIGTERM)
    assert leg.wait() == 75
    newer = s3.steps(here)[-1]
    assert newer > older
    again = lab.run(here)
    assert f"resumed task=lora_tiny leg=3 stage=train step={newer}/10" in again.text
    assert_identical(s3.on_empty_machine(here, tmp_path / "end"), lab.reference(here))


@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_a_kill_while_a_checkpoint_travels_leaves_the_one_before(
    lab: Lab, s3: Far, tmp_path: Path, what: str
) -> None:
    here = lab.task(url=s3.url())
    path = MANIFEST.format(4) if what == "manifest" else "/blobs/"
    leg = lab.start(here)
    wait_for(leg, r"stored .* step=2 ")
    held = s3.proxy.rule(action="delay", method="PUT", path=path, seconds=20)
    wait_until(leg, lambda: held.hits, "the upload was on its way")
    leg.kill()
    leg.wait()
    assert s3.steps(here)[-1] == 2
    s3.proxy.clear()
    there = moved(lab, here)
    second = lab.run(there)
    assert "resumed task=lora_tiny leg=2 stage=train step=2/10" in second.text
    assert_identical(s3.on_empty_machine(there, tmp_path / "end"), lab.reference(here))


def test_a_kill_while_a_checkpoint_comes_is_gone_on_from(lab: Lab, s3: Far, tmp_path: Path) -> None:
    here = lab.task(url=s3.url())
    leg = lab.start(here)
    wait_for(leg, r"stored .* step=[24] ")
    leg.kill()
    leg.wait()
    there = moved(lab, here)
    slow = s3.proxy.rule(action="stall", method="GET", path="/blobs/", seconds=20, skip=1)
    leg = lab.start(there)
    wait_until(leg, lambda: slow.hits, "something large was on its way")
    leg.kill()
    leg.wait()
    s3.proxy.clear()
    second = lab.run(there)
    assert "resumed " in second.text
    assert_identical(s3.on_empty_machine(there, tmp_path / "end"), lab.reference(here))


def test_an_answer_that_was_lost_is_no_other_leg(lab: Lab, far: Far, tmp_path: Path) -> None:
    """The manifest's PUT (a commit, a batch) arrives, its answer does not, and it is repeated."""
    here = lab.task(url=far.url())
    path = {"s3": r"/manifest\.json", "hub": "/commit/main", "bucket": "/batch"}[far.kind]
    lost = far.proxy.rule(action="swallow", method="PUT|POST", path=path)
    leg = lab.run(here)
    assert lost.hits == 1
    assert leg.status == 0
    assert [record["state"] for record in here.legs()] == ["finished"]
    assert_identical(far.on_empty_machine(here, tmp_path / "end"), lab.reference(here))


def test_a_zombie_stores_no_manifest_and_stops(lab: Lab, far: Far, tmp_path: Path) -> None:
    here = lab.task(url=far.url())
    older = lab.start(here)
    # A slow store takes the newest of several.
    wait_for(older, r"stored .* step=[2468] ")
    older.kill(signal.SIGSTOP)
    _node_vanishes(far, here)
    there = moved(lab, here)
    newer = lab.run(there)
    assert newer.status == 0
    before = _everything(far, there)
    older.kill(signal.SIGCONT)
    assert older.wait() == 78, older.text[-2000:]
    assert "taken over" in older.text
    assert _everything(far, there) == before, "the zombie has written to the store"
    assert_identical(far.on_empty_machine(there, tmp_path / "end"), lab.reference(here))


def test_a_second_machine_is_refused_while_the_first_works(lab: Lab, far: Far) -> None:
    here = lab.task(url=far.url())
    first = lab.start(here)
    wait_for(first, r" step=2/10 ")
    first.kill(signal.SIGSTOP)
    second = lab.run(moved(lab, here), expect=78)
    assert f"process {first.pid} " in second.text
    first.kill(signal.SIGCONT)
    assert first.wait() == 0


def test_two_machines_take_turns_until_the_end(lab: Lab, far: Far, tmp_path: Path) -> None:
    machines = [lab.task(url=far.url())]
    machines.append(moved(lab, machines[0]))
    for turn in range(8):
        leg = lab.start(machines[turn % 2])
        wait_for(leg, "(resumed|starting) |finished already")
        leg.kill(signal.SIGTERM)
        if leg.wait() == 0:
            break
        assert leg.status == 75, leg.text[-2000:]
    lab.run(machines[0])
    record = machines[0].legs()
    assert len(record) >= 4
    metrics = [line["step"] for line in machines[0].metrics() if "loss" in line]
    assert metrics == list(range(1, 11)), "a gap or a duplicate"
    end = far.on_empty_machine(machines[0], tmp_path / "end")
    assert_identical(end, lab.reference(machines[0]))
    log = (end.folder / "log.txt").read_text() if (end.folder / "log.txt").exists() else ""
    assert log.count("leg ended") == len(set(log.splitlines()) & set(_ended(log)))


def _ended(log: str) -> list[str]:
    return [line for line in log.splitlines() if "leg ended" in line]


def test_a_damaged_copy_here_is_replaced_by_the_one_in_the_store(
    lab: Lab, far: Far, tmp_path: Path
) -> None:
    here = lab.task(url=far.url())
    leg = lab.start(here)
    wait_for(leg, r" saved .* step=2 ")
    leg.kill(signal.SIGTERM)
    assert leg.wait() == 75
    newest = here.steps()[-1]
    damage(here.checkpoint(newest) / "optimizer.safetensors", "flipped")
    second = lab.run(here)
    assert "using the copy in the store instead" in second.text
    assert f"resumed task=lora_tiny leg=2 stage=train step={newest}/10" in second.text
    assert_identical(far.on_empty_machine(here, tmp_path / "end"), lab.reference(here))


def _node_vanishes(far: Far, task: Task) -> None:
    """Make the leg at work look as after a lost node: another boot, silent for long."""
    remote = far.mirror(task).remote
    name = max(name for name in remote.names("legs"))
    record = json.loads(remote.read(name))
    record["runner"] |= {"boot": "the boot of a node that does not answer", "host": "elsewhere"}
    record["started"] = _earlier(record["started"])
    remote.write(name, json.dumps(record).encode())
    progress = json.loads(remote.read("progress.json"))
    progress["time"] = _earlier(progress["time"])
    remote.write("progress.json", json.dumps(progress).encode())


def _earlier(moment: str) -> str:
    then = datetime.datetime.fromisoformat(moment) - datetime.timedelta(hours=1)
    return then.isoformat(timespec="milliseconds")


def _everything(far: Far, task: Task) -> dict[str, bytes]:
    remote = far.mirror(task).remote
    return {name: remote.read(name) for name in remote.names()}


@pytest.mark.parametrize("which", range(4))
def test_a_kill_at_a_file_operation_of_a_download_harms_nothing(
    lab: Lab, s3: Far, tmp_path: Path, which: int
) -> None:
    here = lab.task(url=s3.url())
    leg = lab.start(here)
    wait_for(leg, r"stored .* step=\d+ ")
    leg.kill()
    leg.wait()
    # All that an empty machine does before it trains, found on one such machine.
    _, operations = lab.traced(moved(lab, here), at=100_000)
    last = max(n for n, line in enumerate(operations, 1) if ".restored-0" in line)
    there = moved(lab, here)
    for number in range(5 + which, last, max(1, last // 3)):
        lab.traced(there, at=number)
        assert s3.steps(here), "what is in the store stays there"
    lab.finish(there, env={"BATON_SUBMISSION": "again"})
    assert_identical(s3.on_empty_machine(there, tmp_path / "end"), lab.reference(here))


TROUBLE = {
    "busy": {"action": "status", "status": 503},
    "broken": {"action": "status", "status": 500, "code": "InternalError"},
    "cut off": {"action": "reset_request"},
    "expired": {"action": "status", "status": 400, "code": "ExpiredToken"},
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_training_goes_on_while_the_store_is_in_trouble_and_the_next_save_recovers(
    lab: Lab, s3: Far, tmp_path: Path, trouble: str
) -> None:
    here = lab.task(url=s3.url())
    leg = lab.start(here)
    wait_for(leg, r"stage finished .*stage=data")
    s3.proxy.rule(method="PUT|POST", times=10**6, **TROUBLE[trouble])
    wait_for(leg, r"stage finished .*stage=train")
    assert s3.steps(here) == [] or s3.steps(here)[-1] < 10
    s3.proxy.clear()
    assert leg.wait() == 0, leg.text[-2000:]
    assert_identical(s3.on_empty_machine(here, tmp_path / "end"), lab.reference(here))


def test_a_leg_waits_for_a_store_that_is_busy_longer_than_libraries_ask(
    lab: Lab, far: Far, tmp_path: Path
) -> None:
    here = lab.task(url=far.url())
    leg = lab.start(here)
    wait_for(leg, r"stored .* step=\d+ ")
    leg.kill()
    leg.wait()
    there = moved(lab, here)
    # At its first look and at its claim. boto3 gives up after 5 tries, the Hub's store after 6.
    method, path = {
        "s3": ("GET", "list-type"),
        "hub": ("POST", "/commit/"),
        "bucket": ("GET", r"/api/buckets/[^/]+/[^/]+$"),
    }[far.kind]
    busy = far.proxy.rule(action="status", status=503, method=method, path=path, times=8)
    leg = lab.run(there)
    assert busy.hits == 8
    assert "waiting for the store" in leg.text
    assert_identical(far.on_empty_machine(there, tmp_path / "end"), lab.reference(here))


def test_a_leg_that_brings_much_says_that_it_lives(lab: Lab, s3: Far) -> None:
    here = lab.task(url=s3.url())
    leg = lab.start(here)
    wait_for(leg, r"stored .* step=\d+ ")
    leg.kill()
    leg.wait()
    remote = s3.mirror(here).remote
    before = json.loads(remote.read("progress.json"))["time"]
    there = moved(lab, here)
    slow = s3.proxy.rule(action="delay", method="GET", path="/blobs/", seconds=25)
    leg = lab.start(there)
    wait_until(leg, lambda: slow.hits, "data were on their way")
    heard = lambda: json.loads(remote.read("progress.json"))["time"] > before  # noqa: E731
    wait_until(leg, heard, "the leg said that it lives")
    assert "stage started" not in leg.text, "it is still bringing what it needs"
    assert leg.wait() == 0, leg.text[-2000:]


def test_a_signal_ends_the_wait_for_a_busy_store_and_is_no_failure(lab: Lab, s3: Far) -> None:
    here = lab.task(url=s3.url())
    leg = lab.start(here)
    wait_for(leg, r"stored .* step=\d+ ")
    leg.kill()
    leg.wait()
    there = moved(lab, here)
    s3.proxy.rule(action="status", status=503, method="GET", path="/blobs/", times=10**6)
    leg = lab.start(there)
    wait_for(leg, "waiting for the store")
    leg.kill(signal.SIGTERM)
    assert leg.wait() == 75, leg.text[-2000:]
    s3.proxy.clear()
    assert "resumed " in lab.run(there).text
    assert [record["state"] for record in there.legs()] == ["lost", "handed_over", "finished"]


def test_two_ranks_with_a_store_in_trouble_wait_for_nobody(
    lab: Lab, s3: Far, tmp_path: Path
) -> None:
    here = lab.task(url=s3.url())
    pair = lab.start_pair(here)
    wait_for(pair[0], r"stage finished .*stage=data")
    s3.proxy.rule(action="delay", method="PUT", seconds=1.0, times=20)
    s3.proxy.rule(action="status", method="PUT", status=400, code="ExpiredToken", times=20)
    wait_for(pair[0], r" step=5/10 ")
    pair[1].kill(signal.SIGTERM)
    assert [leg.wait() for leg in pair] == [75, 75]
    s3.proxy.clear()
    there = moved(lab, here)
    again = lab.start_pair(there)
    assert [leg.wait() for leg in again] == [0, 0], again[0].text[-2000:]
    end = s3.on_empty_machine(there, tmp_path / "end")
    metrics = [line["step"] for line in end.metrics() if "loss" in line]
    assert metrics == list(range(1, 11))


def test_the_last_save_and_the_best_one_are_in_the_store_and_old_ones_are_not(
    lab: Lab, far: Far
) -> None:
    here = lab.task(url=far.url())
    lab.run(here)
    reference = lab.reference(here)
    assert far.steps(here) == reference.steps()
    whole = open_remote(here.url)
    [version] = versions_in(whole)
    assert not [found for found in verify(whole, version) if found.problem]
    assert garbage(whole, version).names == [], "rotation left something behind"


def test_two_processes_with_a_share_each_go_on_on_an_empty_machine(
    lab: Lab, s3: Far, tmp_path: Path
) -> None:
    settings = {"matrix.adapter.method": "[full]", "train.sharding": "full", "train.max_steps": "6"}
    whole = lab.task(settings)
    assert [leg.wait() for leg in lab.start_pair(whole)] == [0, 0]
    here = lab.task(settings, url=s3.url())
    pair = lab.start_pair(here)
    wait_for(pair[0], " step=3/6 ")
    pair[1].kill(signal.SIGTERM)
    assert [leg.wait() for leg in pair] == [75, 75], pair[0].text[-2000:]
    assert here.legs()[-1]["not_stored"] == []
    there = lab.task(settings, url=here.url)
    pair = lab.start_pair(there)
    assert [leg.wait() for leg in pair] == [0, 0], pair[0].text[-2000:] + pair[1].text[-2000:]
    assert re.search(r"resumed .* step=[3-6]/6", pair[0].text)
    end = s3.on_empty_machine(there, tmp_path / "end")
    assert_identical(end, whole)
    assert (end.checkpoint(6) / "shards" / "00001-of-00002.safetensors").exists()
