"""One task, one leg: for each stage, done? skip. Run. Mark."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.claim import claim
from baton.config.decode import decode
from baton.errors import BatonError, ConfigError, ExitStatus, FencedError, StoreBusy, StoreError
from baton.handover import StopSignal
from baton.identity import this_runner
from baton.legs import Legs, utc_now
from baton.pipelines import PIPELINES
from baton.plan import files_of, fingerprint
from baton.record import LegRecord, LegState, Plan, TaskPlan, dump_json, replace
from baton.stage import PROGRESS_EVERY_SECONDS, Alone, Leg, Outcome, Peers, Stage
from baton.store.local import LocalStore
from baton.store.mirror import Mirror
from baton.store.publish import EVAL_RECORD, publish
from baton.store.task_names import CANCELLED, position_of
from baton.store.upload import Uploader, within

log = logging.getLogger(__name__)

# What a failed leg, and the record of an ended one, may take to reach a remote store.
_LAST_SECONDS = 15.0


def task_prefix(plan: Plan, task: str) -> str:
    """Where a task lives in a store."""
    return f"{plan.experiment}/{plan.digest}/tasks/{task}"


def done_marker(stage: str) -> str:
    return f"{stage}/done.json"


@dataclass(kw_only=True)
class TaskRunner:
    """Works on one task until it is finished or has to hand over.

    `until` is the last stage to run; the task is then finished as far as this runner goes.
    `mirror` is there when `store` is this machine's copy of a remote one.
    """

    plan: Plan
    task: TaskPlan
    store: LocalStore
    stop: StopSignal
    submission: str
    mirror: Mirror | None = None
    allow_changed: Sequence[str] = ()
    until: str | None = None
    on_progress: Callable[[Mapping[str, Any]], None] | None = None
    now: Callable[[], str] = utc_now
    uploader: Uploader | None = None
    _card: str = ""

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
        stored = self.mirror.stored_names() if self.mirror else set(self.store.names())
        if all(done_marker(stage) in stored for stage in self.stages):
            log.info("finished already task=%s", self.task.name)
            return ExitStatus.FINISHED
        if CANCELLED in stored or self.store_has(CANCELLED):
            raise FencedError(
                f"{self.name} was cancelled; `baton submit {self.name}` takes it up again"
            )
        self._require_same_inputs()
        with _peers() as peers:
            legs = Legs(self.store, self.name, self.now)
            leg = self._open(legs, config, peers, max(self.position(), self._position_in(stored)))
            with leg.heartbeat(), self._sending(leg):
                try:
                    stages = pipeline.load_stages()[: len(self.stages)]
                    outcome = self._run_stages(leg, stages)
                except BaseException as error:
                    raised = self._reason_behind(leg, error)
                    if isinstance(raised, StoreBusy) and self.stop.is_set:
                        # The store was waited for when somebody wanted the machine back.
                        log.warning("nothing to save: %s", raised)
                        return self._end(legs, leg, Outcome.HANDED_OVER)
                    self._close(legs, leg, "failed", f"{type(raised).__name__}: {raised}", raised)
                    if raised is error:
                        raise
                    raise raised from error
                return self._end(legs, leg, outcome)

    def _open(self, legs: Legs, config: Any, peers: Peers, position: list[int]) -> Leg:
        record = LegRecord(
            task=self.task.name,
            number=0,
            state="active",
            submission=self.submission,
            runner=this_runner(),
            processes=peers.size,
            started=self.now(),
            position=position,
            environment=image_of_this_leg(),
        )
        refused: BatonError | None = None
        if peers.rank == 0:
            try:
                record = claim(record, legs, self.mirror, self.stages, self.stop)
                self.store.sweep()
            except BatonError as error:
                refused = error
        number = peers.broadcast(0 if refused else record.number)
        if not number:
            # The others must not wait for a first process that has given up.
            raise refused or FencedError(f"{self.task.name}: the first process may not start")
        if self.mirror is not None and peers.rank and os.environ.get("LOCAL_RANK") == "0":
            # On another machine than the first process; its neighbours find the files here.
            self.mirror.pull(self.stages)
        return Leg(
            plan=self.plan,
            task=self.task,
            config=config,
            record=replace(record, number=number, notice=_notice(config)),
            store=self.store,
            stop=self.stop,
            peers=peers,
            check_fence=lambda: self._check_fence(legs, number),
            mirror=self.mirror,
            now=self.now,
            notice=_notice(config),
            allow_changed=self.allow_changed,
            on_progress=self.on_progress,
            progress_every_seconds=float(
                os.environ.get("BATON_PROGRESS_SECONDS", PROGRESS_EVERY_SECONDS)
            ),
        )

    def _check_fence(self, legs: Legs, number: int) -> None:
        legs.check_fence(number)
        if self.uploader is not None:
            self.uploader.check_fence()

    @contextlib.contextmanager
    def _sending(self, leg: Leg) -> Iterator[None]:
        """Send what the leg makes to the remote store while it works."""
        if self.mirror is None or not leg.is_first:
            yield
            return

        with self.mirror.hold(wait_seconds=_LAST_SECONDS):
            leg.uploader = self.uploader = Uploader(
                mirror=self.mirror,
                stages=self.stages,
                record=lambda: leg.record,
                durable=leg.stored,
            )
            self.uploader.start()
            try:
                yield
            finally:
                self.uploader.close()

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
            # Models hold themselves in cycles; the next stage needs their memory.
            gc.collect()
            if leg.is_first:
                leg.check_fence()
                if stage is stages[-1]:
                    self._prepare_publication(leg)
                marker = {"stage": stage.name, "leg": leg.record.number, "finished": self.now()}
                self.store.write(done_marker(stage.name), dump_json(marker))
            leg.log("stage finished")
            if leg.peers.agree(self.stop.is_set)[0] and stage is not stages[-1]:
                return Outcome.HANDED_OVER
        return Outcome.FINISHED

    def _prepare_publication(self, leg: Leg) -> None:
        """Where people load models from the store, put a card beside the final weights.

        It travels as every other file does, before the marker of the last stage.
        """
        if self.mirror is None or not self.mirror.version.publishes:
            return
        if not self.store_has(EVAL_RECORD):
            return
        training = PIPELINES[self.plan.pipeline]().training_stages
        self._card = publish(leg.store, self.mirror.remote.url, training)

    def _run_stage(self, leg: Leg, stage: Stage) -> Outcome:
        if stage.all_peers:
            return stage.run(leg)
        outcome = stage.run(leg) if leg.is_first else None
        return Outcome(leg.peers.broadcast(outcome.value if outcome else None))

    def _end(self, legs: Legs, leg: Leg, outcome: Outcome) -> ExitStatus:
        missing = self._send_rest(leg, deadline=lambda: self.stop.deadline)
        if self.uploader is not None and self.uploader.fenced is not None:
            fenced = self.uploader.fenced
            self._close(legs, leg, "failed", f"FencedError: {fenced}", fenced, missing)
            raise fenced
        if outcome is Outcome.FINISHED:
            if missing:
                error = StoreError(
                    f"{self.name}: all is done here, but not all could be stored (missing:"
                    f" {', '.join(missing[:3])}{', …' if missing[3:] else ''}); run it again"
                    " on this machine to send the rest"
                )
                self._close(legs, leg, "failed", str(error), error, missing)
                raise error
            self._close(legs, leg, "finished", "")
            if self.mirror is not None and leg.is_first:
                remote, card = self.mirror.version, self._card
                within(_LAST_SECONDS, lambda: remote.task_finished(card))
            return ExitStatus.FINISHED
        if self.store_has(CANCELLED):
            self._close(legs, leg, "cancelled", "cancelled by a person")
            return ExitStatus.STOP
        reason = f"{self.stop.name or 'a peer'} asked to stop"
        if missing:
            reason += "; the grace was too short to store everything"
        self._close(legs, leg, "handed_over", reason, missing=missing)
        return ExitStatus.HANDED_OVER

    def _close(
        self,
        legs: Legs,
        leg: Leg,
        state: LegState,
        reason: str,
        error: BaseException | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        if not leg.is_first:
            return
        if error is not None and not missing:
            give_up = leg.clock() + _LAST_SECONDS
            missing = self._send_rest(leg, deadline=lambda: give_up)
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
            not_stored=list(missing),
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
        if self.mirror is not None and self.uploader is not None and not self.uploader.fenced:
            # Nothing may say afterwards that this leg is at work.
            leg.record = record
            self.uploader.close()
            mirror = self.mirror
            within(_LAST_SECONDS, lambda: mirror.close_leg(record))

    def _send_rest(self, leg: Leg, *, deadline: Callable[[], float | None]) -> list[str]:
        """Send what is not in the remote store yet; returns what could not be sent."""
        if self.uploader is None or not leg.is_first:
            return []
        missing = self.uploader.finish(deadline=deadline)
        if self.stop.is_set and not missing:
            leg.amend(signal_to_durable_seconds=round(self.stop.seconds_since(), 3))
        return missing

    def store_has(self, name: str) -> bool:
        return self.store.path(name).exists()

    def position(self) -> list[int]:
        """What is durable: stages done, and of the next one the newest step and the shards.

        Grows with every bit of progress; two legs that start at the same position have
        nothing between them.
        """
        return self._position_in(set(self.store.names()))

    def _position_in(self, names: Collection[str]) -> list[int]:
        return position_of(names, self.stages)


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
