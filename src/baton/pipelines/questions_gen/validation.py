"""Problems from fixed prompts, written during training, scored, recorded; a collapse ends it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.data.tokenise import ChatEncoder
from baton.errors import CollapsedError
from baton.generation.sampler import Sampler
from baton.pipelines.questions_gen.config import QuestionsGen
from baton.pipelines.questions_gen.data import read_part
from baton.pipelines.questions_gen.evaluator import evaluate
from baton.pipelines.questions_gen.independent import Judge
from baton.pipelines.questions_gen.memory import log_memory
from baton.pipelines.questions_gen.rewards import keyword_rewards
from baton.pipelines.questions_gen.scoring import question
from baton.pipelines.questions_gen.tfidf import History
from baton.stage import Leg
from baton.train.loop import mix_seed
from baton.train.ranks import Ranks

FILE = "validation.jsonl"
# The first one chooses the best checkpoint, and is watched for a collapse.
SCORES = ("dev_quality", "dev_independent", "dev_keyword")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A `DevScore`: the quality of problems from the first dev rows' prompts."""

    leg: Leg
    ranks: Ranks
    stage: str
    stages_before: Sequence[str]
    sampler: Sampler
    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    asked: Sequence[str]
    judge: Judge
    history: History

    @classmethod
    def of(
        cls,
        leg: Leg,
        ranks: Ranks,
        *,
        stage: str,
        stages_before: Sequence[str],
        sampler: Sampler,
        tokenizer: Any,
        encoder: ChatEncoder,
    ) -> Validation:
        """With the prompts of the task's dev rows, against its training problems."""
        config: QuestionsGen = leg.config
        training = [row.problem for row in read_part(leg.folder, "train")]
        rows = read_part(leg.folder, "dev")[: config.validation.prompts]
        asked = [row.request.text() for row in rows]
        texts = [encoder.prompt_text(text) for text in asked]
        history = History(config.grpo.reward.history)
        for problem in training[: config.grpo.reward.history]:
            history.add(problem)
        return cls(
            leg=leg,
            ranks=ranks,
            stage=stage,
            stages_before=stages_before,
            sampler=sampler,
            tokenizer=tokenizer,
            prompts=tokenizer(texts, add_special_tokens=False)["input_ids"],
            asked=asked,
            judge=Judge.of(training),
            history=history,
        )

    def take(self, step: int) -> dict[str, float] | None:
        """Mean scores at `step`; None where there was no time.

        Raises:
            CollapsedError: the quality fell below the configured share of the best one before.
        """
        config: QuestionsGen = self.leg.config
        grpo, ranks = config.grpo, self.ranks
        mine = list(range(ranks.rank, len(self.prompts), ranks.size))
        drawn = self.sampler.draw(
            [self.prompts[i] for i in mine],
            [mix_seed(grpo.seed, 0, i) for i in mine],
            should_stop=lambda: self.leg.stop.is_urgent,
        )
        if ranks.agree(drawn is None)[0] or drawn is None:
            return None
        shares = ranks.gather(drawn)
        rows = [shares[i % ranks.size][i // ranks.size] for i in range(len(self.prompts))]
        texts = [t.strip() for t in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        scores = self._scores(texts)
        before = ranks.broadcast(self._record(step, scores, texts) if self.leg.is_first else None)
        log_memory(self.leg, ranks.device, f"{self.stage} validation")
        least = config.validation.collapse * before
        if scores[SCORES[0]] < least:
            raise CollapsedError(
                f"{self.stage}: the quality of validation problems fell to {scores[SCORES[0]]:.3f}"
                f" at step {step}; it was {before:.3f} before, and below"
                f" {config.validation.collapse:g} of that is a collapse. Lower"
                f" {self.stage}.learning_rate or raise grpo.beta; see {self.stage}/{FILE}. The"
                " best checkpoint is kept"
            )
        return scores

    def _scores(self, texts: Sequence[str]) -> dict[str, float]:
        judged = [self.judge.score(text) for text in texts]
        qualities = [evaluate(text, j).total for text, j in zip(texts, judged, strict=True)]
        keywords = keyword_rewards([question(text) for text in texts], self.history)
        columns = (qualities, [j.total for j in judged], [k.total for k in keywords])
        return {name: float(np.mean(values)) for name, values in zip(SCORES, columns, strict=True)}

    def _record(self, step: int, scores: dict[str, float], texts: Sequence[str]) -> float:
        """Append to the stage's record; returns the best quality before, of earlier stages too."""
        store = self.leg.store
        earlier = [line for stage in self.stages_before for line in _lines(self.leg, stage)]
        own = [line for line in _lines(self.leg, self.stage) if line["step"] < step]
        line = {"step": step, **scores, "problems": list(texts)}
        lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in [*own, line]]
        store.write(f"{self.stage}/{FILE}", "".join(lines).encode("utf-8", "replace"))
        return max((float(line[SCORES[0]]) for line in [*earlier, *own]), default=0.0)


def _lines(leg: Leg, stage: str) -> list[dict[str, Any]]:
    name = f"{stage}/{FILE}"
    if name not in leg.store.names(stage):
        return []
    return [json.loads(line) for line in leg.store.read(name).decode().splitlines()]
