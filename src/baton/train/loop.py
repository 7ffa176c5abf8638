"""The one training loop: every pipeline trains through it, and every leg goes on in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch

from baton.errors import ConfigError
from baton.stage import Leg, Outcome
from baton.train.ahead import Ahead
from baton.train.batch import TokenSource
from baton.train.batching import Batching, Idle, Packed, Whole, pad_multiple, shortest
from baton.train.compiled import CompiledCode
from baton.train.config import TrainConfig
from baton.train.cursor import Cursor, Indices
from baton.train.devset import DevSet
from baton.train.journal import Journal
from baton.train.keeper import Keeper
from baton.train.layers import layers_of, recompute_layers
from baton.train.memory import Trials, given_plan, plan_memory
from baton.train.metrics import Metrics
from baton.train.optim import Schedule, build_optimizer, set_learning_rate
from baton.train.planner import MemoryPlan
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.train.sharded_state import ShardedState
from baton.train.sharding import Sharded
from baton.train.state import SpreadWeights, Timing, TrainState, Weights

log = logging.getLogger(__name__)

_PLANNED_FROM = 16  # steps whose samples say what memory must hold


class DevScore(Protocol):
    """Scores what a model answers to dev samples."""

    def take(self, step: int) -> dict[str, float] | None:
        """The score by its name, higher is better; None when asked to stop before the end.

        Every rank must call this. Called again at the same step, it goes on from what an
        earlier leg left.
        """
        ...


@dataclass(frozen=True)
class ReadAhead:
    """Tells whoever reads the samples what will be asked for, so many steps before it is."""

    steps: int
    need: Callable[[Indices], None]


class Maker(Protocol):
    """Makes the samples of a step when its turn has come, as reinforcement learning does."""

    def make(self, step: int, indices: Indices) -> bool:
        """Have the samples `indices` of the source ready to train on at `step` (0-based).

        A function of the plan, `step` and the weights alone, so that a leg that starts at `step`
        makes the same. Every rank calls this; False where there was no time for it.
        """
        ...

    def figures(self) -> dict[str, float]:
        """What is to be logged of the step that was trained last; the same on every rank."""
        ...


@dataclass(kw_only=True)
class Loop:
    """Trains `model` on `train` until its steps are done or a handover is asked for.

    Saves happen between steps only. Whether to stop is asked once a step, of all ranks at
    once, so all stop at the same step.

    Attributes:
        loss: summed loss of a micro-batch over its labelled tokens, a float32 scalar.
        part: what a micro-batch adds to the loss of its step, where that is not its summed loss
            by the labels of the step. The dev loss is always the mean of `loss`.
        batching: makes those micro-batches; packs by default.
        score: taken with every dev loss; where it is given, it decides which checkpoint is best.
        read_ahead: hears which samples are to come.
        maker: where it is given, `train` holds what it made for the step at hand.
        sharded: where every rank has a share of the model only; all then compute in step.
        dev_loss, dev_batching: for the dev loss, where they are others than in training.
        versions: how often `train` holds its samples, end to end; each epoch takes the next
            version of them.
        folder: where this stage keeps its files, relative to the task.
        identity, environment, allow_changed: see `Keeper`.
        stop_at: end as finished at this step, for `verify-resume`.
    """

    leg: Leg
    ranks: Ranks
    config: TrainConfig
    model: torch.nn.Module
    weights: Weights
    loss: Callable[[Any], torch.Tensor]
    train: TokenSource
    dev: TokenSource
    part: Callable[[Any, Whole], torch.Tensor] | None = None
    batching: Batching | None = None
    score: DevScore | None = None
    read_ahead: ReadAhead | None = None
    maker: Maker | None = None
    sharded: Sharded | None = None
    dev_loss: Callable[[Any], torch.Tensor] | None = None
    dev_batching: Batching | None = None
    versions: int = 1
    folder: str = "train"
    identity: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    allow_changed: Sequence[str] = ()
    stop_at: int | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.samples = len(self.train) // self.versions
        self.cursor = Cursor(self.samples, config.batch_samples, config.seed, self.versions)
        self.total = config.max_steps or self.cursor.total_steps(config.epochs)
        # With max_steps the last batch is as full as the others.
        self.end = None if config.max_steps else round(config.epochs * self.samples)
        self.schedule = Schedule.of(config, self.total)
        self.precision = Precision.choose(config.precision, self.ranks.device)
        names = {p: n for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(names)
        self.optimizer = build_optimizer(((n, p) for p, n in names.items()), config)
        pad_to = pad_multiple(self.ranks.device, self.precision)
        self.batches = self.batching or Packed(self.ranks.device, pad_to)
        is_known_ahead = self.ranks.device.type == "cuda" and self.maker is None
        self.ahead = Ahead(self._collated) if is_known_ahead else None
        self.state = TrainState(
            tokens_per_micro_batch=config.tokens_per_micro_batch or 0,  # planned by `run`
            identity=self.identity,
            environment=self.environment,
        )
        self.timing = Timing(first_started=self.leg.now())
        shares: ShardedState | None = None
        if config.sharding == "full":
            # However many processes there are: of a plan all checkpoints are of one kind.
            shares = ShardedState(
                ranks=self.ranks,
                weights=cast(SpreadWeights, self.weights),
                optimizer=self.optimizer,
                names=names,
            )
        self.keeper = Keeper(
            leg=self.leg,
            ranks=self.ranks,
            prefix=f"{self.folder}/checkpoints",
            weights=self.weights,
            optimizer=self.optimizer,
            names=names,
            precision=self.precision,
            keep_last=config.keep_last,
            keep_every_steps=config.keep_every_steps,
            identity=self.identity,
            environment=self.environment,
            allow_changed=self.allow_changed,
            shares=shares,
        )
        self.dev_set = DevSet(
            leg=self.leg,
            ranks=self.ranks,
            folder=self.folder,
            source=self.dev,
            batching=self.dev_batching or self.batches,
            loss=self._dev_micro_batch,
            together=self.sharded is not None,
        )
        self.compiled = CompiledCode(leg=self.leg, device=self.ranks.device)
        self.metrics = Metrics(
            self.leg.folder / self.folder,
            run_name=f"{self.leg.plan.experiment}-{self.leg.plan.digest}-{self.leg.task.name}",
            wandb_project=config.wandb_project,
        )
        self.journal = Journal(
            leg=self.leg,
            ranks=self.ranks,
            metrics=self.metrics,
            samples_of=lambda step: self._indices(step).tolist(),
            allow_infinite_norm=self.precision.skips_steps,
        )

    def run(self) -> Outcome:
        """Train to the end, or to the next handover."""
        self.compiled.load()
        self.state, self.timing = self.keeper.restore(self.state, self.timing)
        if self.keeper.saved_step is None:
            self._plan_memory()
        recompute_layers(self.model, self.state.recompute_layers)
        how = "starting" if self.keeper.saved_step is None else "resumed"
        self.leg.log(how, step=f"{self.state.step}/{self.total}")
        self.journal.report(self.state, self.total)
        if self.leg.is_first:
            self.metrics.resume(self.state.step, dev_pending=self.state.dev_pending)
        try:
            return self._run()
        finally:
            self.metrics.close()
            self.compiled.close()
            if self.ahead is not None:
                self.ahead.close()

    def _run(self) -> Outcome:
        state = self.state
        if state.dev_pending and not self._evaluate():
            return Outcome.HANDED_OVER
        while state.step < self.last_step and not self._is_stopped_early():
            stop = self._step()
            if stop is None:
                # Abandoned half-way: the weights are those of the last finished step.
                self._save()
                return Outcome.HANDED_OVER
            self.compiled.step_done()
            if state.step % self.config.log_every_steps == 0 or state.step == self.total:
                self._log()
            state.dev_pending = self._is_evaluation_due()
            if stop or state.dev_pending or self._save_due or state.step == self.last_step:
                # Before the evaluation: then what a checkpoint holds depends on its step
                # alone, and a kill while evaluating loses nothing.
                self._save()
            if stop:
                return Outcome.HANDED_OVER
            if state.dev_pending and not self._evaluate():
                self._save()  # durable already; this notes how long after the signal
                return Outcome.HANDED_OVER
        return Outcome.FINISHED

    @property
    def last_step(self) -> int:
        return self.total if self.stop_at is None else min(self.stop_at, self.total)

    def _plan_memory(self) -> None:
        """Set how large micro-batches are, and how many layers recompute."""
        # What a maker makes is not there yet; a trial that fails on one rank stops the others.
        is_open = self.maker is None and self.sharded is None
        can_try = self.ranks.device.type == "cuda" and is_open
        plan = given_plan(self.config, self.model, can_try=can_try) or self._tried_plan()
        self.state.tokens_per_micro_batch = plan.tokens
        self.state.recompute_layers = plan.recompute_layers

    def _tried_plan(self) -> MemoryPlan:
        some = [self._indices(step) for step in range(min(_PLANNED_FROM, self.total))]
        trials = Trials(
            model=self.model,
            part=self._part,
            precision=self.precision,
            ranks=self.ranks,
            batches=self.batches,
            source=self.train,
            indices=max(some, key=lambda indices: int(self.train.lengths(indices).sum())),
        )
        return plan_memory(self.leg, self.folder, self.config, trials, some)

    # --- one step -----------------------------------------------------------------------

    def _step(self) -> bool | None:
        """One optimizer step. Returns whether to stop after it; None if it was abandoned."""
        step = self.state.step
        indices = self._indices(step)
        if self.maker is not None:
            is_made = self.maker.make(step, indices)
            if self.ranks.agree(not is_made)[0]:
                return None
        lengths = self.train.lengths(indices)
        labelled = int(self.train.labelled(indices).sum())
        if self.read_ahead is not None:
            self.read_ahead.need(self._indices(step + self.read_ahead.steps))
        while True:
            loss, out_of_memory = self._accumulate(Whole(len(indices), labelled))
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
            self._shrink_micro_batch(self.batches.least(self.train, indices))
        if self.sharded is None:
            self.ranks.sum_gradients(self.parameters)
        set_learning_rate(self.optimizer, self.schedule.at(step))
        norm = self.precision.step(self.optimizer, self.parameters, self.config.clip_norm)
        self.optimizer.zero_grad(set_to_none=True)
        figures = {} if self.maker is None else self.maker.figures()
        self.journal.add(step + 1, loss, norm, figures)
        self.journal.speed.count(int(lengths.sum()))
        self.state.step += 1
        self.state.samples += len(indices)
        self.state.tokens += int(lengths.sum())
        self.state.labelled_tokens += labelled
        self.journal.report(self.state, self.total)
        return stop

    def _indices(self, step: int) -> Indices:
        return self.cursor.at(step, end=self.end)

    def _accumulate(self, whole: Whole) -> tuple[torch.Tensor, bool]:
        """Add up gradients of this rank's share of the step, divided by all its labels.

        Returns the share's part of the loss, and whether memory ran out.
        """
        step, budget = self.state.step, self.state.tokens_per_micro_batch
        make = self._collated if self.ahead is None else self.ahead.take
        batches = make(step, budget)
        total = torch.zeros((), device=self.ranks.device)
        self.model.train()
        try:
            for number, batch in enumerate(batches):
                if self._is_urgent():
                    break
                # Dropout follows from where we are, so there is no RNG state to save.
                torch.manual_seed(mix_seed(self.config.seed, step, self.ranks.rank, number))
                with self.precision.autocast():
                    loss = self._computed(partial(self._part, batch, whole))
                self.precision.backward(loss)
                total += loss.detach()
        except torch.OutOfMemoryError as error:
            if self.sharded is not None:
                # The others wait for this rank's share, so that it cannot begin anew.
                raise ConfigError(
                    f"out of memory with {budget} tokens a micro-batch; set"
                    " train.tokens_per_micro_batch to less, or use more GPUs"
                ) from error
            return total, True
        return total, False

    def _is_urgent(self) -> bool:
        """Is there no time for the rest of the step? Ranks with shares of a model all say so."""
        urgent = self.leg.stop.is_urgent
        return urgent if self.sharded is None else self.ranks.agree(urgent)[0]

    def _computed(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `work` makes of the model, its weights gathered meanwhile where it is sharded."""
        if self.sharded is None:
            return work()
        result: torch.Tensor = self.sharded(work)
        return result

    def _part(self, batch: Any, whole: Whole) -> torch.Tensor:
        if isinstance(batch, Idle):
            return 0 * self._part(batch.batch, whole)
        if self.part is not None:
            return self.part(batch, whole)
        return self.loss(batch) / whole.labelled

    def _collated(self, step: int, budget: int) -> Iterator[Any]:
        """The micro-batches of this rank's share of a step."""
        indices = self._indices(step)
        shares = self.batches.cut(self.train, indices, ranks=self.ranks.size, budget=budget)
        mine = shares[self.ranks.rank]
        for share in mine:
            yield self.batches.collate(self.train, indices[share], budget=budget)
        if self.sharded is not None:
            least = shortest(self.train, indices)
            for _ in range(max(map(len, shares)) - len(mine)):
                yield Idle(self.batches.collate(self.train, least, budget=budget))

    def _shrink_micro_batch(self, least: int) -> None:
        """Halve the micro-batch after running out of memory; batch and order stay.

        Where that is not enough, all layers recompute, unless the configuration says no.
        """
        was, layers = self.state.tokens_per_micro_batch, len(layers_of(self.model))
        may_recompute = self.config.activation_checkpointing is None
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        if was <= least and may_recompute and self.state.recompute_layers < layers:
            self.state.recompute_layers = layers
            recompute_layers(self.model)
            log.warning("out of memory: all %d layers recompute their activations", layers)
            return
        if was <= least:
            raise ConfigError(
                f"out of memory with one sample of {least} tokens a micro-batch; set"
                " train.activation_checkpointing: true, shorten data.max_length, or use a"
                " smaller model or QLoRA"
            )
        self.state.tokens_per_micro_batch = was // 2
        log.warning(
            "out of memory: micro-batches of %d tokens instead of %d; batch and order unchanged",
            was // 2,
            was,
        )

    # --- between steps ------------------------------------------------------------------

    def _is_evaluation_due(self) -> bool:
        step, every = self.state.step, self.config.eval_every_steps
        if len(self.dev) == 0:
            return False
        if step == self.total:
            return True
        if every is not None:
            return step % every == 0
        # The step in which the last sample of an epoch was used.
        size, batch = self.samples, self.config.batch_samples
        return step * batch // size > (step - 1) * batch // size

    def _evaluate(self) -> bool:
        """Take the dev loss at this step; False if cut off by a handover."""
        self.journal.read(self.state)
        self.model.eval()
        with self.journal.speed.paused():
            loss = self.dev_set.mean_loss(self.state.step, budget=self.state.tokens_per_micro_batch)
            if self.sharded is not None:
                self.sharded.reshard()  # left whole after the last forward pass
            if loss is None:
                return False
            scores = {} if self.score is None else self.score.take(self.state.step)
            if scores is None:
                return False
        self.state.dev_history.append([float(self.state.step), loss, *scores.values()])
        self.state.dev_pending = False
        self.journal.evaluated(self.state, loss, scores)
        return True

    def _dev_micro_batch(self, indices: Indices) -> torch.Tensor:
        batching, loss = self.dev_batching or self.batches, self.dev_loss or self.loss
        batch = batching.collate(self.dev, indices, budget=self.state.tokens_per_micro_batch)
        with torch.no_grad(), self.precision.autocast():
            return self._computed(partial(loss, batch))

    def _is_stopped_early(self) -> bool:
        patience = self.config.early_stop_patience
        return patience is not None and self.state.evaluations_since_best() >= patience

    def _log(self) -> None:
        self.journal.log(
            self.state,
            learning_rate=self.schedule.at(self.state.step - 1),
            epoch=self.state.samples / self.samples,
            total=self.total,
        )

    def _is_save_due(self, step: int) -> bool:
        minutes = self.config.save_every_minutes
        late = minutes is not None and time.monotonic() - self.keeper.saved_at > minutes * 60
        return late or step % self.config.save_every_steps == 0

    def _save(self) -> None:
        """Commit the state, after making sure that it is worth keeping."""
        self.journal.read(self.state)
        seconds = self.journal.speed.take()
        self.timing.training_seconds += seconds
        self.leg.amend(training_seconds=self.leg.record.training_seconds + seconds)
        if self.ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.ranks.device)
            self.timing.peak_gpu_memory_bytes = max(self.timing.peak_gpu_memory_bytes, peak)
        with self.journal.speed.paused():
            if self.leg.is_first:
                self.metrics.sync()
            self.keeper.save(self.state, self.timing)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; SeedSequence spreads even neighbouring ones."""
    words: Any = np.random.SeedSequence(list(parts)).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])
