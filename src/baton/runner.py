"""One task, one leg: for each stage, done? skip. Run. Mark."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.config.decode import decode
from baton.errors import BatonError, ConfigError, ExitStatus, FencedError
from baton.handover import StopSignal
from baton.legs import Legs, this_runner, utc_now
from baton.pipelines import PIPELINES
from baton.plan import files_of, fingerprint
from baton.record import LegRecord, LegState, Plan, TaskPlan, dump_json, replace
from baton.stage import PROGRESS_EVERY_SECONDS, Alone, Leg, Outcome, Peers, Stage
from baton.store.local import LocalStore

log = logging.getLogger(__name__)

CANCELLED = "cancelled.json"


def task_prefix(plan: Plan, task: str) -> str:
    """Where a task lives in a store."""
    return f"{plan.experiment}/{plan.digest}/tasks/{task}"


def done_marker(stage: str) -> str:
    return f"{stage}/done.json"


@dataclass(kw_only=True)
class TaskRunner:
    """Works on one task until it is finished or has to hand over.

    `until` is the last stage to run; the task is then finished as far as this runner goes.
    """

    plan: Plan
    task: TaskPlan
    store: LocalStore
    stop: StopSignal
    submission: str
    allow_changed: Sequence[str] = ()
    until: str | None = None
    on_progress: Callable[[Mapping[str, Any]], None] | None = None
    now: Callable[[], str] = utc_now

    @property
    def name(self) -> str:
        """The task as every command takes it."""
        return f"{self.plan.experiment}/{self.task.name}"

    def run(self) -> ExitStatus:
        """One leg. Raises what a stage raises, after writing it into the leg's record."""
        pipeline = PIPELINES[self.plan.pipeline]()
        # Decoded before anything is claimed: a plan of an older baton may not fit this one.
        config: Any = decode(pipeline.config, self.task.config, where=f"plan {self.plan.digest}")
        self.stages = _up_to(self.until, pipeline.stage_names, self.name)
        if self._next_stage() is None:
            log.info("finished already task=%s", self.task.name)
            return ExitStatus.FINISHED
        if self.store_has(CANCELLED):
            raise FencedError(
                f"{self.name} was cancelled; `baton submit {self.name}` takes it up again"
            )
        self._require_same_inputs()
        with _peers() as peers:
            legs = Legs(self.store, self.name, self.now)
            leg = self._open(legs, config, peers)
            try:
                with leg.heartbeat():
                    stages = pipeline.load_stages()[: len(self.stages)]
                    outcome = self._run_stages(leg, stages)
            except BaseException as error:
                raised = self._reason_behind(leg, error)
                self._close(legs, leg, "failed", f"{type(raised).__name__}: {raised}", raised)
                if raised is error:
                    raise
                raise raised from error
            return self._end(legs, leg, outcome)

    def _open(self, legs: Legs, config: Any, peers: Peers) -> Leg:
        record = LegRecord(
            task=self.task.name,
            number=0,
            state="active",
            submission=self.submission,
            runner=this_runner(),
            processes=peers.size,
            started=self.now(),
            position=self.position(),
            environment=image_of_this_leg(),
        )
        refused: BatonError | None = None
        if peers.rank == 0:
            try:
                legs.wait_for_silence(record, should_stop=lambda: self.stop.is_set)
                record = legs.open(record)
                self.store.sweep()
            except BatonError as error:
                refused = error
        number = peers.broadcast(0 if refused else record.number)
        if not number:
            # The others must not wait for a first process that has given up.
            raise refused or FencedError(f"{self.task.name}: the first process may not start")
        return Leg(
            plan=self.plan,
            task=self.task,
            config=config,
            record=replace(record, number=number, notice=_notice(config)),
            store=self.store,
            stop=self.stop,
            peers=peers,
            check_fence=lambda: legs.check_fence(number),
            now=self.now,
            notice=_notice(config),
            allow_changed=self.allow_changed,
            on_progress=self.on_progress,
            progress_every_seconds=float(
                os.environ.get("BATON_PROGRESS_SECONDS", PROGRESS_EVERY_SECONDS)
            ),
        )

    def _reason_behind(self, leg: Leg, error: BaseException) -> BaseException:
        """A leg that was taken over from finds its files gone: that is the reason, then."""
        try:
            leg.check_fence()
        except FencedError as fenced:
            return fenced
        return error

    def _require_same_inputs(self) -> None:
        """Refuse input files that changed since the plan was frozen and before they were read.

        Raises:
            ConfigError: names each file.
        """
        if "data" in self.allow_changed or self.position()[0]:
            return
        problems = []
        for path, key in files_of(self.task).items():
            was = self.plan.fingerprints.get(path)
            if was is not None and fingerprint(path, key=key) != was:
                problems.append(
                    f"data.{key}: {path} is not the file that was submitted; submit again for a"
                    " new run of the file as it is now, or use --allow-changed data"
                )
        if problems:
            raise ConfigError(problems)

    def _run_stages(self, leg: Leg, stages: tuple[Stage, ...]) -> Outcome:
        for stage in stages:
            if leg.peers.broadcast(self.store_has(done_marker(stage.name))):
                continue
            leg.amend(stage=stage.name)
            leg.start_over(stage=stage.name)
            leg.log("stage started")
            outcome = self._run_stage(leg, stage)
            if outcome is Outcome.HANDED_OVER:
                return outcome
            if leg.is_first:
                leg.check_fence()
                marker = {"stage": stage.name, "leg": leg.record.number, "finished": self.now()}
                self.store.write(done_marker(stage.name), dump_json(marker))
            leg.log("stage finished")
            if leg.peers.agree(self.stop.is_set)[0] and stage is not stages[-1]:
                return Outcome.HANDED_OVER
        return Outcome.FINISHED

    def _run_stage(self, leg: Leg, stage: Stage) -> Outcome:
        if stage.all_peers:
            return stage.run(leg)
        outcome = stage.run(leg) if leg.is_first else None
        return Outcome(leg.peers.broadcast(outcome.value if outcome else None))

    def _end(self, legs: Legs, leg: Leg, outcome: Outcome) -> ExitStatus:
        if outcome is Outcome.FINISHED:
            self._close(legs, leg, "finished", "")
            return ExitStatus.FINISHED
        if self.store_has(CANCELLED):
            self._close(legs, leg, "cancelled", "cancelled by a person")
            return ExitStatus.STOP
        self._close(legs, leg, "handed_over", f"{self.stop.name or 'a peer'} asked to stop")
        return ExitStatus.HANDED_OVER

    def _close(
        self,
        legs: Legs,
        leg: Leg,
        state: LegState,
        reason: str,
        error: BaseException | None = None,
    ) -> None:
        if not leg.is_first:
            return
        status = {"finished": 0, "handed_over": 75, "cancelled": 78}.get(state)
        if error is not None:
            status = error.exit_status if isinstance(error, BatonError) else ExitStatus.FAILED
        record = replace(
            leg.record,
            state=state,
            ended=self.now(),
            reason=reason,
            signal=self.stop.name,
            exit_status=status,
            position_at_end=self.position(),
        )
        # The record must not hide the error that ended the leg, on a full disk for instance.
        with contextlib.suppress(BatonError) if error is not None else contextlib.nullcontext():
            legs.close(record)
        leg.report(now=True, stage=leg.record.stage)
        log.info(
            "leg ended task=%s leg=%d state=%s durable_step=%s reason=%r",
            self.task.name,
            record.number,
            state,
            record.durable_step,
            reason,
        )

    def store_has(self, name: str) -> bool:
        return self.store.path(name).exists()

    def _next_stage(self) -> str | None:
        return next((s for s in self.stages if not self.store_has(done_marker(s))), None)

    def position(self) -> list[int]:
        """What is durable: stages done, and of the next one the newest step and the shards.

        Grows with every bit of progress; two legs that start at the same position have
        nothing between them.
        """
        done = sum(self.store_has(done_marker(stage)) for stage in self.stages)
        stage = self._next_stage()
        if stage is None:
            return [done, 0, 0]
        manifests = self.store.root.glob(f"{stage}/checkpoints/step-*/manifest.json")
        steps = [int(path.parent.name.removeprefix("step-")) for path in manifests]
        shards = sum(1 for _ in self.store.root.glob(f"{stage}/shards/*"))
        return [done, max(steps, default=0), shards]


def _up_to(stage: str | None, stages: tuple[str, ...], task: str) -> tuple[str, ...]:
    if stage is None:
        return stages
    if stage not in stages:
        raise ConfigError(f"{task} has no stage {stage!r}; it has: {', '.join(stages)}")
    return stages[: stages.index(stage) + 1]


@contextlib.contextmanager
def _peers() -> Any:
    """The processes of this leg; torch is not needed to find out that there is only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    from baton.train.ranks import Ranks

    ranks = Ranks.join()
    try:
        yield ranks
    finally:
        ranks.leave()


def _notice(config: Any) -> str:
    if getattr(getattr(config, "model", None), "source", None) == "random":
        from baton.train.config import RANDOM_NOTICE

        return RANDOM_NOTICE
    return ""


def submission_id() -> str:
    """What groups the legs that one submission starts, as far as the environment tells."""
    if "BATON_SUBMISSION" in os.environ:
        return os.environ["BATON_SUBMISSION"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"slurm:{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm:{os.environ['SLURM_JOB_ID']}"
    return f"run:{os.getpid()}:{utc_now()}"


def image_of_this_leg() -> dict[str, str]:
    """Which image a leg runs in, and of which commit, as far as the environment tells."""
    names = {"image": "BATON_IMAGE", "commit": "BATON_COMMIT"}
    return {key: os.environ[name] for key, name in names.items() if os.environ.get(name)}


def task_store(root: Path, plan: Plan, task: str) -> LocalStore:
    """The store of one task, below the root of a local store."""
    return LocalStore(root / task_prefix(plan, task))
