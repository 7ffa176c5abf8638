"""A trained model at work: documents become vectors, the best ones are chosen, it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from baton.data.chunks import chunks_of
from baton.errors import DataError
from baton.eval.config import GenerateConfig
from baton.eval.generate import Answers, generate, generate_embedded
from baton.pipelines.clara.batch import PackedTexts, memory_positions
from baton.pipelines.clara.losses import encode
from baton.pipelines.clara.model import DECODER, ENCODER, REASONER, ClaraLearner
from baton.pipelines.clara.prompt import Prompter
from baton.pipelines.clara.topk import cosine_scores, rank
from baton.train import attention
from baton.train.batch import collate
from baton.train.batching import pad_multiple
from baton.train.precision import Precision

# Tokens encoded at once: a few GB of activations in a model of 7B.
_TOKENS_AT_ONCE = 16_384
# Of a text that has to be cut, how much of a document a piece fills: sentences end before it.
_FILLED = 0.9


@dataclass(frozen=True)
class Asked:
    """A question about documents."""

    question: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class _Texts:
    """Texts in memory, as a token source of which nothing is predicted."""

    ids: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([len(self.ids[i]) for i in indices], dtype=np.int64)

    def labelled(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.zeros(len(indices), dtype=np.int64)

    def sample(self, index: int) -> tuple[NDArray[np.int64], int]:
        return np.array(self.ids[index], dtype=np.int64), len(self.ids[index])


class Responder:
    """Answers with a learner in eval mode.

    `retrieves` is whether there is a query reasoner to choose `top_k` documents; without one all
    documents are read.
    """

    def __init__(
        self, learner: ClaraLearner, *, top_k: int, retrieves: bool, precision: Precision
    ) -> None:
        learner.model.eval()
        self.learner = learner
        self.top_k = top_k
        self.retrieves = retrieves
        self.precision = precision
        self.prompter = Prompter(learner.vocabulary)
        self.device: torch.device = learner.embedding.memory.device

    @property
    def tokenizer(self) -> Any:
        return self.learner.vocabulary.tokenizer

    def compress(self, documents: Sequence[str]) -> torch.Tensor:
        """The vectors of documents: `(documents, n, width)`."""
        return self._encode(documents, ENCODER)

    def retrieve(self, question: str, vectors: torch.Tensor) -> list[int]:
        """Positions of the best documents, best first; all of them where there are too few."""
        query = self._encode([question], REASONER).flatten()
        scores = cosine_scores(query, vectors.flatten(1))
        chosen: list[int] = rank(scores, min(self.top_k, len(vectors))).tolist()
        return chosen

    def answer(
        self,
        asks: Sequence[Asked],
        config: GenerateConfig,
        *,
        seed: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Answers | None, list[list[int]]]:
        """Answer a batch from compressed documents; also which of them were read, in rank order.

        Raises:
            DataError: a question has no documents, or too many to read without choosing.
        """
        distinct = list(dict.fromkeys(text for ask in asks for text in ask.documents))
        place = {text: position for position, text in enumerate(distinct)}
        for ask in asks:
            self._require_documents(ask)
        vectors = self.compress(distinct)
        prompts, chosen = [], []
        for ask in asks:
            own = vectors[[place[text] for text in ask.documents]]
            read = self.retrieve(ask.question, own) if self.retrieves else [*range(len(own))]
            chosen.append(read)
            prompts.append(self._prompt(ask.question, own[read]))
        with self.learner.roles.using(DECODER):
            answers = generate_embedded(
                self._generating(),
                self.tokenizer,
                prompts,
                config,
                ends=(self.prompter.end_of_turn,),
                seed=seed,
                should_stop=should_stop,
                on_text=on_text,
            )
        return answers, chosen

    def answer_from_text(
        self,
        asks: Sequence[Asked],
        config: GenerateConfig,
        *,
        limit: int | None,
        seed: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Answers | None:
        """What the base model answers to the same prompt with texts in it, or none.

        A prompt of more than `limit` tokens has its last documents cut off.
        """
        with self.learner.roles.using(None):
            return generate(
                self._generating(),
                self.tokenizer,
                [self._text_prompt(ask, limit) for ask in asks],
                config,
                ends=(self.prompter.end_of_turn,),
                seed=seed,
                should_stop=should_stop,
            )

    def chunks(self, text: str) -> list[str]:
        """A text in pieces that fit into the encoder, cut where sentences end."""
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        room = self.learner.vocabulary.encoder_tokens - 3
        if tokens <= room:
            return [text]
        return chunks_of(text, max_chars=max(1, int(_FILLED * room * len(text) / tokens)))

    def _require_documents(self, ask: Asked) -> None:
        if not ask.documents:
            raise DataError("clara answers from documents: give at least one (--document FILE)")
        if not self.retrieves and len(ask.documents) > self.top_k:
            raise DataError(
                f"{len(ask.documents)} documents are more than stage2.top_k ({self.top_k}), and"
                " there is no query reasoner to choose among them: train stage 3 as well"
            )

    def _prompt(self, question: str, vectors: torch.Tensor) -> torch.Tensor:
        """Embeddings of a prompt about documents, `(tokens, width)`."""
        prompter, vocabulary = self.prompter, self.learner.vocabulary
        text = prompter.prompt_text(*prompter.question(question, len(vectors)))
        [ids] = self.tokenizer([text], add_special_tokens=False)["input_ids"]
        tokens = torch.tensor(ids, device=self.device)
        first = vocabulary.first
        slots = (tokens >= first) & (tokens < first + vocabulary.vectors)
        with torch.no_grad():
            rows = self.learner.embedding(tokens).clone()
            rows[slots] = vectors.flatten(0, 1).to(rows.dtype)
        return rows

    def _text_prompt(self, ask: Asked, limit: int | None) -> str:
        prompter = self.prompter
        background = "\n".join(ask.documents)
        text = prompter.prompt_text(*prompter.question_about(ask.question, background))
        count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if limit is None or count <= limit:
            return text
        ids = self.tokenizer(background, add_special_tokens=False)["input_ids"]
        # A few tokens more than needed: what is cut may be read as other tokens afterwards.
        kept = self.tokenizer.decode(ids[: max(0, len(ids) - (count - limit) - 4)])
        return prompter.prompt_text(*prompter.question_about(ask.question, kept))

    def _encode(self, texts: Sequence[str], role: str) -> torch.Tensor:
        vocabulary = self.learner.vocabulary
        ids = vocabulary.encoder_ids(list(texts))
        self.learner.network.set_attn_implementation(attention.NAME)
        pad_to = pad_multiple(self.device, self.precision)
        size = max(1, _TOKENS_AT_ONCE // max(map(len, ids)))
        found = []
        for first in range(0, len(ids), size):
            some = ids[first : first + size]
            lengths = [len(text) for text in some]
            packed = PackedTexts(
                pack=collate(_Texts(some), range(len(some)), device=self.device, pad_to=pad_to),
                memory=torch.from_numpy(memory_positions(lengths, vocabulary.vectors)).to(
                    self.device
                ),
                lengths=tuple(lengths),
            )
            with torch.no_grad(), self.precision.autocast():
                found.append(encode(self.learner, packed, role).vectors)
        return torch.cat(found)

    def _generating(self) -> Any:
        """The network with the attention that keeps keys and values."""
        self.learner.network.set_attn_implementation("sdpa")
        return self.learner.network
