"""The losses of the three stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import mse_loss

from baton.pipelines.clara.batch import ClaraBatch, PackedTexts
from baton.pipelines.clara.config import Stage1, Stage2, Stage3
from baton.pipelines.clara.model import DECODER, ENCODER, REASONER, ClaraLearner
from baton.pipelines.clara.topk import cosine_scores, select
from baton.train.batching import Whole
from baton.train.loss import CausalLoss


@dataclass(frozen=True)
class Encoded:
    """What a role makes of texts: `hidden` `(tokens, width)`, `vectors` `(texts, n, width)`."""

    hidden: torch.Tensor
    vectors: torch.Tensor


def encode(learner: ClaraLearner, texts: PackedTexts, role: str) -> Encoded:
    """Run texts through the base with the adapter of a role; nothing is padded, nothing mixed."""
    pack = texts.pack
    with learner.roles.using(role):
        hidden = learner.network.base_model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            use_cache=False,
            **pack.attention(),
        ).last_hidden_state[0]
    count = len(texts.lengths)
    vectors = hidden.index_select(0, texts.memory).view(count, -1, hidden.shape[-1])
    return Encoded(hidden, vectors)


def state_distance(encoded: Encoded, texts: PackedTexts) -> torch.Tensor:
    """MSE between the mean of a document's token states and that of its memory states.

    Averaged over documents and width, a float32 scalar; both sides get gradient. The tokens are
    all but the memory tokens: `<ENC>`, bos, text and eos.
    """
    with torch.autocast(encoded.hidden.device.type, enabled=False):
        hidden = encoded.hidden.float()
        vectors = encoded.vectors.float()
        weights = hidden.new_zeros(len(texts.lengths), len(hidden))
        start = 0
        for row, length in enumerate(texts.lengths):
            text = length - vectors.shape[1]
            weights[row, start : start + text] = 1.0 / text
            start += length
        return mse_loss(weights @ hidden, vectors.mean(dim=1))


class _StageLoss:
    """What all stages share: the answer's cross-entropy behind vectors in place of documents."""

    def __init__(self, learner: ClaraLearner, *, compute_dtype: torch.dtype, average: str) -> None:
        self.learner = learner
        self.average = average
        self._causal = CausalLoss(learner.network, compute_dtype=compute_dtype)

    def _answers(self, batch: ClaraBatch, vectors: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy; `vectors` `(slots, width)` are used as they are."""
        rows = self.learner.embedding(batch.turns.input_ids)
        rows = rows[0].index_copy(0, batch.slots, vectors.to(rows.dtype))[None]
        with self.learner.roles.using(DECODER):
            return self._causal(batch.turns, rows)

    def _averaged(self, summed: torch.Tensor, batch: ClaraBatch, whole: Whole) -> torch.Tensor:
        if self.average == "global":
            return summed / whole.labelled
        # As means of micro-batches, each with the weight of its samples.
        return summed / len(batch.turns.labels) * (batch.samples / whole.samples)


class ReadingLoss(_StageLoss):
    """Stages 1 and 2: cross-entropy of the answers, and the distance of the states."""

    def __init__(
        self, learner: ClaraLearner, stage: Stage1 | Stage2, *, compute_dtype: torch.dtype
    ) -> None:
        super().__init__(learner, compute_dtype=compute_dtype, average=stage.train.ce_average)
        self.stage = stage

    def __call__(self, batch: ClaraBatch) -> torch.Tensor:
        """Summed cross-entropy alone: what dev losses compare."""
        encoded = encode(self.learner, batch.documents, ENCODER)
        return self._answers(batch, encoded.vectors.flatten(0, 1))

    def part(self, batch: ClaraBatch, whole: Whole) -> torch.Tensor:
        """What the micro-batch adds to `CE + 0.1 MSE` of its step."""
        encoded = encode(self.learner, batch.documents, ENCODER)
        loss = torch.zeros((), device=encoded.hidden.device)
        if self.stage.qa_loss:
            answers = self._answers(batch, encoded.vectors.flatten(0, 1))
            loss = loss + self._averaged(answers, batch, whole)
        if self.stage.mse_loss:
            distance = state_distance(encoded, batch.documents)
            # Every sample has as many documents.
            loss = loss + self.stage.mse_weight * distance * (batch.samples / whole.samples)
        return loss


class RetrievalLoss(_StageLoss):
    """Stage 3: cross-entropy of answers from the documents that the query reasoner chose."""

    def __init__(self, learner: ClaraLearner, stage: Stage3, *, compute_dtype: torch.dtype) -> None:
        super().__init__(learner, compute_dtype=compute_dtype, average=stage.train.ce_average)
        self.stage = stage

    def __call__(self, batch: ClaraBatch) -> torch.Tensor:
        """Summed cross-entropy."""
        return self._answers(batch, self.chosen(batch))

    def part(self, batch: ClaraBatch, whole: Whole) -> torch.Tensor:
        """What the micro-batch adds to the loss of its step."""
        return self._averaged(self(batch), batch, whole)

    def chosen(self, batch: ClaraBatch) -> torch.Tensor:
        """Vectors of each sample's best documents in rank order, `(samples * k * n, width)`."""
        assert batch.queries is not None, "a batch of stage 3 has queries"
        with torch.no_grad(), _without_dropout(self.learner.model):
            documents = encode(self.learner, batch.documents, ENCODER).vectors.flatten(1)
        queries = encode(self.learner, batch.queries, REASONER).vectors.flatten(1)
        chosen = []
        for query, numbers in zip(queries, batch.numbers, strict=True):
            own = documents[list(numbers)]
            best, _ = select(
                cosine_scores(query, own),
                own,
                self.stage.top_k,
                temperature=self.stage.temperature,
                upstream_mask=self.stage.upstream_topk_mask,
            )
            chosen.append(best)
        return torch.cat(chosen).view(-1, self.learner.embedding.memory.shape[1])


@contextlib.contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
