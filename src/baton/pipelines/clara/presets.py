"""Batch, micro-batch and number of samples of a stage: as configured, else by the GPU's memory."""

from __future__ import annotations

from dataclasses import dataclass, fields

from baton.pipelines.clara.config import Clara, ClaraTrain, StageName
from baton.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What the guide recommends for a GPU; `samples` is None for all."""

    batch_samples: int
    micro_batch: int
    samples: int | None


PRESETS = {
    "16gb": Preset(batch_samples=32, micro_batch=1, samples=200),
    "40gb": Preset(batch_samples=64, micro_batch=2, samples=500),
    "80gb": Preset(batch_samples=128, micro_batch=2, samples=1000),
}
# The largest whose GPU is not larger than the one at hand; a "40 GB" GPU reports a little less.
_LEAST_GB = {"80gb": 70.0, "40gb": 36.0, "16gb": 0.0}
# Where no preset is asked for.
_DEFAULT = Preset(batch_samples=128, micro_batch=2, samples=None)
# The end-to-end stage never takes a larger batch unless it is set by hand.
_STAGE3_BATCH = 32


def preset_for(memory_gb: float) -> str:
    """The name of the preset for a GPU of this memory (10⁹ bytes)."""
    return next(name for name, least in _LEAST_GB.items() if memory_gb >= least)


def chosen(train: ClaraTrain, stage: StageName, preset: str) -> Preset:
    """What a stage trains with: what is set wins over the preset; `off` are the defaults."""
    base = PRESETS.get(preset, _DEFAULT)
    batch = min(base.batch_samples, _STAGE3_BATCH) if stage == "stage3" else base.batch_samples
    return Preset(
        batch_samples=train.batch_samples or batch,
        micro_batch=train.micro_batch or base.micro_batch,
        samples=train.samples or base.samples,
    )


def loop_config(config: Clara, stage: StageName, sizes: Preset) -> TrainConfig:
    """What the loop is told: plain training, the micro-batch in tokens of full samples."""
    train = config.stage(stage).train
    values = {field.name: getattr(train, field.name) for field in fields(TrainConfig)}
    values["batch_samples"] = sizes.batch_samples
    values["tokens_per_micro_batch"] = sizes.micro_batch * config.full_sample(stage)
    return TrainConfig(**values)
