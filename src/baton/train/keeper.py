"""Saves a run between two steps and brings it back at the start of a leg."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baton.errors import ConfigError
from baton.stage import Leg
from baton.store.checkpoint import Retention
from baton.train import state as saved
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.train.sharded_state import ShardedState, require_shared
from baton.train.state import Timing, TrainState, Weights

log = logging.getLogger(__name__)

_STAGING = ".staging-"


@dataclass(kw_only=True)
class Keeper:
    """Everything of a run that must outlive its process, and the checkpoints it lives in.

    Attributes:
        identity: what must be the same in every leg (base weights, data); a difference is
            refused unless named in `allow_changed`.
        shares: where every rank saves and loads a share of weights and optimizer.
        environment: what may change, but is said when it does.
    """

    leg: Leg
    ranks: Ranks
    prefix: str
    weights: Weights
    optimizer: torch.optim.Optimizer
    names: Mapping[torch.nn.Parameter, str]
    precision: Precision
    keep_last: int
    keep_every_steps: int | None
    identity: Mapping[str, str]
    environment: Mapping[str, str]
    allow_changed: Sequence[str] = ()
    shares: ShardedState | None = None
    saved_step: int | None = None
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.checkpoints = self.leg.checkpoints(self.prefix)

    def restore(self, fresh: TrainState, timing: Timing) -> tuple[TrainState, Timing]:
        """Go on from the newest checkpoint that is whole, or start with `fresh` at step 0.

        Raises:
            ConfigError: the checkpoint is of another base or other data.
        """
        rank = self.ranks.rank if self.shares is None else 0
        folder = self.leg.folder / f".restored-{rank}"
        if self.shares is not None and self.ranks.size > 1:
            require_shared(self.leg.folder, self.ranks)
        if self.leg.is_first:
            for left_over in self.leg.folder.glob(f"{_STAGING}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            self.checkpoints.sweep()
            manifest = self.checkpoints.fetch_newest_verified(folder)
            found = self.ranks.broadcast(manifest.step if manifest else None)
        else:
            found = self.ranks.broadcast(None)
            if found is not None and self.shares is None:
                self.checkpoints.fetch_anywhere(found, folder)
        if found is not None:
            fresh, timing = self._load(folder)
            self.saved_step = fresh.step
        if self.shares is not None:
            self.ranks.gather(None)  # all have read it
        if self.shares is None or self.leg.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        # A leg that goes through several stages came from where the first of them was.
        first = self.leg.record.from_step
        self.leg.amend(from_step=fresh.step if first is None else first, to_step=fresh.step)
        if found is not None and self.leg.is_first:
            self.leg.saved(self.prefix, fresh.step, self._retention(fresh))
        return fresh, timing

    def _load(self, folder: Path) -> tuple[TrainState, Timing]:
        state, timing = saved.read_state(folder)
        self._compare(state)
        if self.shares is not None:
            self.shares.load(folder)
        else:
            self.weights.load(folder)
            saved.load_optimizer(self.optimizer, self.names, folder)
        self.precision.load(state.scaler)
        environment = dict(self.environment)
        if self.ranks.device.type == "cpu":
            # On a CPU the number of threads decides in which order sums are taken.
            threads = state.environment.get("threads")
            if threads is not None:
                environment["threads"] = threads
                torch.set_num_threads(int(threads))
        state.identity, state.environment = dict(self.identity), environment
        return state, timing

    def _compare(self, state: TrainState) -> None:
        """Refuse a leg whose result would be another; name what merely changed."""
        changed = saved.differences(state.identity, self.identity)
        refused = [f"{k}: {v}" for k, v in changed.items() if k not in self.allow_changed]
        if refused:
            raise ConfigError(
                [f"changed since the checkpoint of step {state.step}: {line}" for line in refused]
                + ["the result would be another; to go on all the same: --allow-changed KEY"]
            )
        moved = saved.differences(state.environment, self.environment)
        if self.ranks.device.type == "cpu":
            moved.pop("threads", None)
        for key, value in (changed | moved).items():
            log.warning("changed since step %d: %s: %s", state.step, key, value)

    def save(self, state: TrainState, timing: Timing) -> None:
        """Commit the state, once a step, and drop what retention lets go."""
        self.saved_at = time.monotonic()
        if not self.leg.is_first:
            if self.shares is not None and self.saved_step != state.step:
                self.ranks.broadcast(None)  # the folder is there
                self.shares.save(self._staging)
                self.saved_step = state.step
            return
        if self.saved_step != state.step:
            self._write(state, timing)
            self.saved_step = state.step
            seconds = time.monotonic() - self.saved_at
            self.leg.log("saved", step=state.step, seconds=seconds)
        self.leg.saved(self.prefix, state.step, self._retention(state))
        signalled = self.leg.stop.is_set
        self.leg.amend(
            to_step=state.step,
            signal_to_durable_seconds=(
                round(self.leg.stop.seconds_since(), 3) if signalled else None
            ),
        )

    def _write(self, state: TrainState, timing: Timing) -> None:
        state.scaler = self.precision.state()
        staging = self._staging
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        if self.shares is not None:
            self.ranks.broadcast(None)
            self.shares.save(staging)
        else:
            self.weights.save(staging)
            saved.save_optimizer(self.optimizer, self.names, staging)
        saved.write_state(state, timing, staging)
        self.checkpoints.save(state.step, staging)
        shutil.rmtree(staging)
        self.checkpoints.prune(self._retention(state))

    @property
    def _staging(self) -> Path:
        # A folder of this leg's own: an older leg that wakes up must not mix its files in.
        return self.leg.folder / f"{_STAGING}{self.leg.record.number:03d}"

    def _retention(self, state: TrainState) -> Retention:
        return Retention(
            keep_last=self.keep_last,
            keep_every_steps=self.keep_every_steps,
            best=state.best[0] if state.best else None,
        )
