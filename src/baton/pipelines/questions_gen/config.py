"""One task of the matrix (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from baton.config.decode import Count, at_least, between
from baton.data.config import SourceConfig
from baton.data.teacher import TeacherConfig
from baton.eval.config import EvalConfig, GenerateConfig, Sampling
from baton.train.config import AdapterConfig, ModelConfig, TrainConfig

Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SourceConfig):
    """Chat rows mixed into supervised training, so that the model goes on to answer other things.

    A row holds a conversation as a list of `{from, value}` or `{role, content}`; its first
    question and answer are taken. `share` is that of chat rows in the mix.
    """

    column: str = "conversations"
    share: Annotated[float, between(0, 0.9)] = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns:
            raise ValueError(f"columns is not for chat rows, use column, got {self.columns}")


@dataclass(frozen=True, kw_only=True)
class ProblemData(SourceConfig):
    """Where problems come from, and which of them are of competition kind.

    Attributes:
        min_competition_score: rows above it are kept.
        rows: the size of the training subset; None takes all there are.
        shares: of the kept rows for training, validation (dev) and the final test.
        dev_rows: at most so many dev rows give the dev loss.
    """

    columns: dict[str, str | list[str]] = field(
        default_factory=lambda: {"problem": "problem", "solution": "solution"}
    )
    chat: ChatConfig | None = None
    min_competition_score: Annotated[float, between(0, 1)] = 0.3
    min_chars: Annotated[int, at_least(1)] = 5
    max_chars: Annotated[int, at_least(1)] = 100_000
    rows: Annotated[Count, at_least(1)] | None = None
    dev_rows: Annotated[Count, at_least(1)] | None = 256
    shares: tuple[float, float, float] = (0.9, 0.05, 0.05)
    seed: int = 3407
    max_length: Annotated[int, at_least(8)] = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_columns("problem", "solution")
        if abs(sum(self.shares) - 1) > 1e-9 or min(self.shares) <= 0:
            raise ValueError(
                f"shares must be three positive parts of 1 (train, dev, test), got"
                f" {list(self.shares)}"
            )


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig):
    """Supervised fine-tuning on the problems: batch 1, accumulated 8 times, in the guide."""

    sharding: Literal["none"] = "none"
    max_steps: Annotated[int, at_least(1)] | None = 200
    batch_samples: Annotated[int, at_least(1)] = 8
    warmup_steps: Annotated[int, at_least(0)] | None = 10
    eval_every_steps: Annotated[int, at_least(1)] | None = 50
    save_every_steps: Annotated[int, at_least(1)] = 50
    seed: int = 3407


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a completion is rewarded for: a weighted sum.

    Attributes:
        keyword: of R = 0.4 D + 0.3 N + 0.2 G + 0.1 V, which keywords can win.
        independent: of the score that they cannot.
        checked: for an answer that was computed to be right.
        repetition: taken off for text that repeats itself.
        history: rewards and questions looked back on.
        normalise: reward by how many standard deviations above the recent mean it is.
        std_floor: the least standard deviation that is divided by.
    """

    keyword: Annotated[float, between(0, 10)] = 1.0
    independent: Annotated[float, between(0, 10)] = 1.0
    checked: Annotated[float, between(0, 10)] = 0.0
    repetition: Annotated[float, between(0, 10)] = 0.5
    history: Annotated[int, at_least(1)] = 1000
    normalise: bool = True
    std_floor: Annotated[float, between(1e-6, 10)] = 0.05

    def __post_init__(self) -> None:
        if self.keyword + self.independent + self.checked == 0:
            raise ValueError("one of keyword, independent and checked must be more than 0")


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(TrainConfig):
    """Group relative policy optimisation; `max_steps` counts optimizer steps.

    Attributes:
        prompts: of one batch of completions.
        group: completions of each prompt.
        batch_samples: completions of one optimizer step; all of a batch unless given.
        iterations: how often a batch is gone through before the next one is drawn.
        loss: how the losses of tokens become one number, by TRL's names.
        bnpo_samples: completions of a micro-batch for `bnpo`, whose loss depends on it.
        clip: the ratio of probabilities is clipped to 1 - clip .. 1 + clip.
        beta: weight of the divergence from the policy that the stage began with.
        corrected_kl: weigh that divergence with the ratio of probabilities, as TRL does by default.
        sample_batch: completions drawn at once.
        variation_share: of a batch's prompts, ask for variations of the best problems so far.
        best_problems: how many those are.
    """

    sharding: Literal["none"] = "none"
    max_steps: Annotated[int, at_least(1)] | None = 100
    tokens_per_micro_batch: Annotated[int, at_least(1)] = 8192
    learning_rate: Annotated[float, between(0, 10)] = 5e-6
    warmup_steps: Annotated[int, at_least(0)] | None = 10
    eval_every_steps: Annotated[int, at_least(1)] | None = 20
    save_every_steps: Annotated[int, at_least(1)] = 10
    log_every_steps: Annotated[int, at_least(1)] = 1
    seed: int = 3407
    prompts: Annotated[int, at_least(1)] = 8
    group: Annotated[int, at_least(2)] = 8
    batch_samples: Annotated[int, at_least(0)] = 0
    iterations: Annotated[int, at_least(1)] = 1
    loss: Aggregation = "grpo"
    bnpo_samples: Annotated[int, at_least(1)] = 8
    clip: Annotated[float, between(0, 1)] = 0.2
    beta: Annotated[float, between(0, 10)] = 0.04
    corrected_kl: bool = False
    max_new_tokens: Annotated[int, at_least(1)] = 256
    sampling: Sampling = field(
        default_factory=lambda: Sampling(temperature=0.7, top_p=0.8, top_k=20)
    )
    sample_batch: Annotated[int, at_least(1)] = 64
    variation_share: Annotated[float, between(0, 1)] = 0.25
    best_problems: Annotated[int, at_least(1)] = 32
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps is None:
            raise ValueError("max_steps must be given: drawn completions have no epochs")
        if self.completions % self.samples_a_step:
            raise ValueError(
                f"batch_samples must divide the {self.completions} completions of a batch"
                f" (prompts x group), got {self.batch_samples}"
            )
        if self.samples_a_step % self.bnpo_samples and self.loss == "bnpo":
            raise ValueError(
                f"bnpo_samples must divide the {self.samples_a_step} completions of a step,"
                f" got {self.bnpo_samples}"
            )
        if self.sampling.repetition_penalty != 1:
            raise ValueError("sampling.repetition_penalty must be 1: it would change the policy")

    @property
    def completions(self) -> int:
        return self.prompts * self.group

    @property
    def samples_a_step(self) -> int:
        return self.batch_samples or self.completions

    @property
    def updates(self) -> int:
        """Optimizer steps on the completions of one batch."""
        return self.completions // self.samples_a_step * self.iterations


@dataclass(frozen=True, kw_only=True)
class OpenAITeacher(TeacherConfig):
    """A language model behind an OpenAI-compatible API."""

    source: Literal["openai"]


@dataclass(frozen=True, kw_only=True)
class SympyTeacher:
    """Computer algebra: corrects answers that can be computed, varies numbers, solves anew.

    It knows sums, not style; nothing that it cannot compute is taught.
    """

    source: Literal["sympy"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """Supervised fine-tuning on what a teacher made of the student's problems.

    Attributes:
        problems: that the student proposes.
        variations: of each, that the teacher is asked for.
        min_score: improved problems below it (0 to 1, mean of five criteria) are not taught.
        attempts: how often the teacher is asked for an answer that can be read.
    """

    sharding: Literal["none"] = "none"
    teacher: OpenAITeacher | SympyTeacher
    max_steps: Annotated[int, at_least(1)] | None = 80
    batch_samples: Annotated[int, at_least(1)] = 4
    learning_rate: Annotated[float, between(0, 10)] = 1e-5
    warmup_steps: Annotated[int, at_least(0)] | None = 10
    eval_every_steps: Annotated[int, at_least(1)] | None = 20
    save_every_steps: Annotated[int, at_least(1)] = 20
    seed: int = 3407
    problems: Annotated[int, at_least(1)] = 128
    variations: Annotated[int, at_least(0)] = 2
    min_score: Annotated[float, between(0, 1)] = 0.5
    attempts: Annotated[int, at_least(1)] = 3


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Problems generated from fixed prompts during training, and what a collapse is.

    Training stops when the score falls below `collapse` times the best one before.
    """

    prompts: Annotated[int, at_least(1)] = 16
    collapse: Annotated[float, between(0, 1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class StageView:
    """A task as one of its training stages sees it: what `baton.tuning` takes."""

    model: ModelConfig
    adapter: AdapterConfig
    train: TrainConfig
    eval: EvalConfig


@dataclass(frozen=True, kw_only=True)
class QuestionsGen:
    """Teach a model to write competition problems: by examples, by reward, by a teacher."""

    model: ModelConfig
    data: ProblemData
    distill: DistillConfig
    adapter: AdapterConfig = field(
        default_factory=lambda: AdapterConfig(r=32, alpha=32, dropout=0.0, targets="all-linear")
    )
    sft: SftConfig = field(default_factory=SftConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    eval: EvalConfig = field(
        default_factory=lambda: EvalConfig(
            max_samples=128,
            generate=GenerateConfig(
                max_new_tokens=512, sampling=Sampling(temperature=0.7, top_p=0.8, top_k=20)
            ),
        )
    )

    def view(self, train: TrainConfig) -> StageView:
        """The configuration with `train` as that of its training."""
        return StageView(model=self.model, adapter=self.adapter, train=train, eval=self.eval)
