"""The one training loop: every pipeline trains through it, and every leg goes on in it."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.errors import ConfigError, NonFiniteError
from baton.stage import Leg, Outcome
from baton.store.checkpoint import Checkpoints
from baton.train import state as saved
from baton.train.attention import can_use_varlen
from baton.train.batch import PackedBatch, TokenSource, collate
from baton.train.config import TrainConfig
from baton.train.cursor import Cursor
from baton.train.metrics import Metrics
from baton.train.optim import Schedule, build_optimizer, set_learning_rate
from baton.train.packing import pack
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.train.state import Timing, TrainState, Weights

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Loop:
    """Trains `model` on `train` until its steps are done or a handover is asked for.

    Saves happen between steps only. Whether to stop is asked once a step, of all ranks at
    once, so all stop at the same step.

    Attributes:
        loss: summed loss of a packed micro-batch over its labelled tokens, a float32 scalar.
        folder: where this stage keeps its files, relative to the task.
        identity: what must be the same in every leg (base weights, data); a difference is
            refused unless named in `allow_changed`.
        stop_at: end as finished at this step, for `verify-resume`.
    """

    leg: Leg
    ranks: Ranks
    config: TrainConfig
    model: torch.nn.Module
    weights: Weights
    loss: Callable[[PackedBatch], torch.Tensor]
    train: TokenSource
    dev: TokenSource
    folder: str = "train"
    identity: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    allow_changed: Sequence[str] = ()
    stop_at: int | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.cursor = Cursor(len(self.train), config.batch_samples, config.seed)
        self.total = config.max_steps or self.cursor.total_steps(config.epochs)
        # With max_steps the last batch is as full as the others.
        self.end = None if config.max_steps else round(config.epochs * len(self.train))
        self.schedule = Schedule.of(config, self.total)
        self.precision = Precision.choose(config.precision, self.ranks.device)
        self.names = {p: n for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        self.optimizer = build_optimizer(((n, p) for p, n in self.names.items()), config)
        self.use_varlen = can_use_varlen(self.ranks.device) and self.precision.is_half
        self.checkpoints = Checkpoints(
            self.leg.store,
            f"{self.folder}/checkpoints",
            self.leg.record.number,
            self.leg.check_fence,
            self.leg.now,
            self.leg.notice,
        )
        self.metrics = Metrics(
            self.leg.folder / self.folder,
            run_name=f"{self.leg.plan.experiment}-{self.leg.plan.digest}-{self.leg.task.name}",
            wandb_project=config.wandb_project,
        )
        self.state = TrainState(
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            identity=self.identity,
            environment=self.environment,
        )
        self.timing = Timing(first_started=self.leg.now())
        self._losses: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._speed = Speed()

    def run(self) -> Outcome:
        """Train to the end, or to the next handover."""
        self._resume()
        if self.leg.is_first:
            self.metrics.resume(self.state.step, dev_pending=self.state.dev_pending)
        try:
            return self._run()
        finally:
            self.metrics.close()

    def _run(self) -> Outcome:
        if self.state.dev_pending and not self._evaluate():
            return Outcome.HANDED_OVER
        while self.state.step < self.last_step and not self._is_stopped_early():
            stopping = self._step()
            if stopping is None:
                # Abandoned half-way: the weights are those of the last finished step.
                self._save()
                return Outcome.HANDED_OVER
            step = self.state.step
            if step % self.config.log_every_steps == 0 or step == self.total:
                self._log()
            evaluated = False
            if self._is_evaluation_due(step):
                self.state.dev_pending = True
                evaluated = not stopping and self._evaluate()
                stopping = stopping or not evaluated
            if stopping or evaluated or self._save_due or step == self.last_step:
                self._save()
            if stopping:
                return Outcome.HANDED_OVER
        return Outcome.FINISHED

    @property
    def last_step(self) -> int:
        return self.total if self.stop_at is None else min(self.stop_at, self.total)

    # --- one step -----------------------------------------------------------------------

    def _step(self) -> bool | None:
        """One optimizer step. Returns whether to stop after it; None if it was abandoned."""
        step = self.state.step
        indices = self.cursor.at(step, end=self.end)
        lengths = self.train.lengths(indices)
        labelled = int(self.train.labelled(indices).sum())
        while True:
            loss, out_of_memory = self._accumulate(indices, lengths, labelled)
            stop, memory, urgent, self._save_due = self.ranks.agree(
                self.leg.stop.is_set,
                out_of_memory,
                self.leg.stop.is_urgent,
                self._is_save_due(step + 1),
            )
            if urgent:
                self.optimizer.zero_grad(set_to_none=True)
                return None
            if not memory:
                break
            self._shrink_micro_batch(int(lengths.max()))
        self.ranks.sum_gradients(self.parameters)
        set_learning_rate(self.optimizer, self.schedule.at(step))
        norm = self.precision.step(self.optimizer, self.parameters, self.config.clip_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self._speed.count(int(lengths.sum()))
        self._losses.append((step + 1, loss, norm))
        self.state.step += 1
        self.state.samples += len(indices)
        self.state.tokens += int(lengths.sum())
        self.state.labelled_tokens += labelled
        self._report()
        return stop

    def _accumulate(
        self, indices: np.ndarray, lengths: np.ndarray, labelled: int
    ) -> tuple[torch.Tensor, bool]:
        """Gradients of this rank's share of the step; loss is already over all labels."""
        shares = pack(
            lengths.tolist(), ranks=self.ranks.size, budget=self.state.tokens_per_micro_batch
        )
        total = torch.zeros((), device=self.ranks.device)
        self.model.train()
        try:
            for number, share in enumerate(shares[self.ranks.rank]):
                if self.leg.stop.is_urgent:
                    break
                batch = self._collate(self.train, indices[share])
                torch.manual_seed(
                    mix_seed(self.config.seed, self.state.step, self.ranks.rank, number)
                )
                with self.precision.autocast():
                    loss = self.loss(batch) / labelled
                self.precision.backward(loss)
                total += loss.detach()
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return total, True
        return total, False

    def _collate(self, source: TokenSource, indices: np.ndarray) -> PackedBatch:
        return collate(
            source, indices.tolist(), device=self.ranks.device, use_varlen=self.use_varlen
        )

    def _shrink_micro_batch(self, longest: int) -> None:
        """Halve the micro-batch after running out of memory; batch and order stay."""
        was = self.state.tokens_per_micro_batch
        if was <= longest:
            raise ConfigError(
                f"out of memory with one sample of {longest} tokens a micro-batch; set"
                " train.activation_checkpointing: true, shorten data.max_length, or use a"
                " smaller model or QLoRA"
            )
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        self.state.tokens_per_micro_batch = was // 2
        log.warning(
            "out of memory: micro-batches of %d tokens instead of %d; batch and order unchanged",
            was // 2,
            was,
        )

    # --- evaluation, logging, saving -----------------------------------------------------

    def _is_evaluation_due(self, step: int) -> bool:
        if len(self.dev) == 0:
            return False
        if step == self.total:
            return True
        if self.config.eval_every_steps is not None:
            return step % self.config.eval_every_steps == 0
        # The step in which the last sample of an epoch was used.
        size, batch = len(self.train), self.config.batch_samples
        return step * batch // size > (step - 1) * batch // size

    @torch.no_grad()
    def _evaluate(self) -> bool:
        """Mean loss per labelled token of the dev set; False if cut off by a handover."""
        self._check_finite()
        with self._speed.paused():
            return self._evaluate_dev()

    def _evaluate_dev(self) -> bool:
        self.model.eval()
        indices = np.arange(len(self.dev))
        shares = pack(
            self.dev.lengths(indices).tolist(),
            ranks=self.ranks.size,
            budget=self.state.tokens_per_micro_batch,
        )
        mine = shares[self.ranks.rank]
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for number in range(max(map(len, shares))):
            if self.ranks.agree(self.leg.stop.is_set)[0]:
                return False
            if number < len(mine):
                with self.precision.autocast():
                    total += self.loss(self._collate(self.dev, indices[mine[number]]))
        labelled = int(self.dev.labelled(indices).sum())
        loss = self.ranks.sum([float(total)])[0] / labelled
        self.state.dev_history.append([self.state.step, loss])
        self.state.dev_pending = False
        self._write_metrics({"dev_loss": loss}, {})
        self.leg.log("evaluated", step=self.state.step, dev_loss=loss)
        self._report(dev_loss=loss)
        return True

    def _is_stopped_early(self) -> bool:
        patience = self.config.early_stop_patience
        return patience is not None and self.state.evaluations_since_best() >= patience

    def _check_finite(self) -> None:
        """Bring the losses of the last steps to the host, and stop if one is not a number."""
        if not self._losses:
            return
        rows = torch.stack([torch.stack((loss, norm)) for _, loss, norm in self._losses])
        # Every rank holds the loss of its share; the norm is of the summed gradient already.
        losses = self.ranks.sum(rows[:, 0].tolist())
        norms = rows[:, 1].tolist()
        for (step, _, _), loss, norm in zip(self._losses, losses, norms, strict=True):
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.precision.skips_steps):
                indices = self.cursor.at(step - 1, end=self.end)
                raise NonFiniteError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}, on training"
                    f" samples {indices.tolist()}; the last checkpoint is from before it. Lower"
                    " train.learning_rate, use precision: bf16 or fp32, or look at those samples"
                )
            # JSON has no infinity: a step that fp16 skipped has no norm to average.
            self.state.window.append([loss, norm if math.isfinite(norm) else 0.0])
        self._losses.clear()

    def _log(self) -> None:
        self._check_finite()
        losses, norms = zip(*self.state.window, strict=True)
        self.state.window.clear()
        values = {
            "loss": math.fsum(losses) / len(losses),
            "grad_norm": math.fsum(norms) / len(norms),
            "learning_rate": self.schedule.at(self.state.step - 1),
            "epoch": self.state.samples / len(self.train),
            "samples": self.state.samples,
            "tokens": self.state.tokens,
        }
        measured = {"tokens_per_s": self._speed.recent()}
        self._write_metrics(values, measured)
        self._report(loss=values["loss"], tokens_per_s=measured["tokens_per_s"])
        self.leg.log(
            "step",
            step=f"{self.state.step}/{self.total}",
            loss=values["loss"],
            lr=values["learning_rate"],
            grad_norm=values["grad_norm"],
            tokens_per_s=round(measured["tokens_per_s"]),
        )

    def _write_metrics(self, values: dict[str, float], measured: dict[str, float]) -> None:
        if self.leg.is_first:
            self.metrics.write(self.state.step, values, measured)

    def _report(self, **values: Any) -> None:
        seconds = self._speed.seconds_per_step()
        self.leg.report(
            step=self.state.step,
            total=self.total,
            eta_seconds=round(seconds * (self.total - self.state.step), 1),
            durable_step=self._saved_step,
            **values,
        )

    def _is_save_due(self, step: int) -> bool:
        minutes = self.config.save_every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > minutes * 60
        return late or step % self.config.save_every_steps == 0

    def _save(self) -> None:
        """Commit the state between two steps, and drop what retention lets go."""
        self._check_finite()
        self._account_time()
        self._saved_at = time.monotonic()
        if self.leg.is_first:
            with self._speed.paused():
                self._commit()

    def _commit(self) -> None:
        if self._saved_step != self.state.step:
            self.metrics.sync()
            self._write_checkpoint()
            self._saved_step = self.state.step
            seconds = time.monotonic() - self._saved_at
            self.leg.log("saved", step=self.state.step, seconds=seconds)
            self._report()
        signalled = self.leg.stop.is_set
        self.leg.amend(
            durable_step=self._saved_step,
            to_step=self.state.step,
            signal_to_durable_seconds=(
                round(self.leg.stop.seconds_since(), 3) if signalled else None
            ),
        )

    def _write_checkpoint(self) -> None:
        self.state.scaler = self.precision.state()
        staging = self.leg.folder / ".staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        self.weights.save(staging)
        saved.save_optimizer(self.optimizer, self.names, staging)
        saved.write_state(self.state, self.timing, staging)
        self.checkpoints.save(self.state.step, staging)
        shutil.rmtree(staging)
        best = self.state.best
        self.checkpoints.prune(keep={best[0]} if best else (), keep_last=self.config.keep_last)

    def _account_time(self) -> None:
        seconds = self._speed.take()
        self.timing.training_seconds += seconds
        self.leg.amend(training_seconds=self.leg.record.training_seconds + seconds)
        if self.ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.ranks.device)
            self.timing.peak_gpu_memory_bytes = max(self.timing.peak_gpu_memory_bytes, peak)

    # --- resuming -------------------------------------------------------------------------

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole, or start at step 0."""
        restored = self.leg.folder / f".restored-{self.ranks.rank}"
        if self.leg.is_first:
            self.checkpoints.sweep()
            manifest = self.checkpoints.fetch_newest_verified(restored)
            found = self.ranks.broadcast(manifest.step if manifest else None)
        else:
            found = self.ranks.broadcast(None)
            if found is not None:
                self.checkpoints.fetch(found, restored)
        if found is None:
            self.leg.log("starting", step=f"0/{self.total}")
        else:
            self._load(restored)
            self.leg.log("resumed", step=f"{self.state.step}/{self.total}")
        shutil.rmtree(restored, ignore_errors=True)
        self.leg.amend(from_step=self.state.step, to_step=self.state.step, durable_step=found)
        self._report()

    def _load(self, folder: Path) -> None:
        state, timing = saved.read_state(folder)
        self._compare(state)
        self.weights.load(folder)
        saved.load_optimizer(self.optimizer, self.names, folder)
        self.precision.load(state.scaler)
        state.identity, state.environment = self.identity, self.environment
        self.state, self.timing = state, timing
        self._saved_step = state.step

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
        for key, value in (changed | moved).items():
            log.warning("changed since step %d: %s: %s", state.step, key, value)


class Speed:
    """Seconds spent training and tokens trained, without forcing the device to wait.

    The clock runs from one pause to the next rather than around each step: work that a GPU
    still does when a step returns is waited for, and so counted, when losses are read.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds = 0.0
        self._taken = 0.0
        self._marked = (0.0, 0)
        self._tokens = 0
        self._steps = 0

    @property
    def seconds(self) -> float:
        return self._seconds + time.monotonic() - self._started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is evaluation or saving, not training."""
        self._seconds = self.seconds
        try:
            yield
        finally:
            self._started = time.monotonic()

    def count(self, tokens: int) -> None:
        self._tokens += tokens
        self._steps += 1

    def recent(self) -> float:
        """Tokens a second since the last call."""
        seconds, tokens = self.seconds - self._marked[0], self._tokens - self._marked[1]
        self._marked = self.seconds, self._tokens
        return tokens / seconds if seconds else 0.0

    def seconds_per_step(self) -> float:
        return self.seconds / self._steps if self._steps else 0.0

    def take(self) -> float:
        """Seconds since the last call."""
        seconds = self.seconds - self._taken
        self._taken += seconds
        return seconds


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; SeedSequence spreads even neighbouring ones."""
    words = np.random.SeedSequence(list(parts)).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])
