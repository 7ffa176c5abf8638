"""What an experiment says about its evaluation (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from baton.config.decode import at_least, between


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw tokens instead of taking the likeliest; seeded, so it repeats."""

    temperature: Annotated[float, between(0.01, 10)] = 0.7
    top_p: Annotated[float, between(0, 1)] = 0.9
    top_k: Annotated[int, at_least(0)] = 50
    repetition_penalty: Annotated[float, between(0.1, 10)] = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How answers are generated: greedy unless `sampling` is given.

    `engine` is how prompts share a model: `padded` answers `batch_size` of them side by side by
    transformers' own generation; `paged` lets new ones enter as others end, as many as memory
    allows; `vllm` hands the merged model to vLLM, where that is installed; `auto` is `paged` on a
    GPU, except where training is deterministic, and `padded` elsewhere.
    """

    max_new_tokens: Annotated[int, at_least(1)] = 256
    batch_size: Annotated[int, at_least(1)] = 32
    engine: Literal["auto", "paged", "padded", "vllm"] = "auto"
    sampling: Sampling | None = None

    def describe(self) -> str:
        """One phrase for records and reports."""
        if self.sampling is None:
            return "greedy"
        s = self.sampling
        return (
            f"sampled at temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k},"
            f" repetition penalty {s.repetition_penalty:g}, seed {s.seed}"
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Which test rows are answered, and how the scores are taken."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)
    max_samples: Annotated[int, at_least(1)] | None = None
    seed: int = 0
    bootstrap_resamples: Annotated[int, at_least(100)] = 1000
    report_samples: Annotated[int, at_least(0)] = 8

    def require_padded(self, why: str) -> None:
        """Raises `ValueError` if another engine than the one that is left is asked for."""
        if self.generate.engine not in ("auto", "padded"):
            raise ValueError(
                f"eval.generate.engine: {self.generate.engine}: {why}; leave it out, or at padded"
            )
