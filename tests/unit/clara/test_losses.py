"""The losses against plain, padded arithmetic; whatever is packed, shared out or padded."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from clara_lab import QUESTIONS, TEXTS, batching_of, source_of
from torch._dynamo.utils import counters
from torch.nn.functional import cosine_similarity, cross_entropy

from baton.pipelines.clara.config import ClaraTrain, Stage1, Stage2, Stage3, Stage3Train
from baton.pipelines.clara.losses import ReadingLoss, RetrievalLoss
from baton.pipelines.clara.model import DECODER, ENCODER, REASONER
from baton.pipelines.clara.prompt import Prompter
from baton.pipelines.clara.topk import select
from baton.train.batching import Whole
from baton.train.layers import compile_layers

ASKS = [
    (QUESTIONS[0], "1250", (0, 3)),
    (QUESTIONS[1], "weavers who grow flax", (1, 2)),
    (QUESTIONS[2], "Falstead", (4, 0)),
    (QUESTIONS[0], "in 1250, on the Wye", (0, 1)),
    (QUESTIONS[2], "it", (3, 4)),
]
CANDIDATES = [(q, a, (*d, *(i for i in range(5) if i not in d))[: 3 + n % 3])
              for n, (q, a, d) in enumerate(ASKS)]  # fmt: skip
FP32 = torch.float32


def trained(learner):
    return {n: p for n, p in learner.model.named_parameters() if p.requires_grad}


def gradients(learner, loss) -> dict[str, torch.Tensor]:
    learner.model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trained(learner).items() if p.grad is not None}


def by_micro_batches(learner, loss, source, *, size: int, share: bool = False):
    """The loss of a step and its gradients, in micro-batches of `size` samples."""
    batching = batching_of(learner, share=share)
    indices = np.arange(len(source))
    whole = Whole(len(source), int(source.labelled(indices).sum()))
    [pieces] = batching.cut(source, indices, ranks=1, budget=size * batching.full)
    assert max(map(len, pieces)) == min(size, len(source))
    learner.model.zero_grad()
    total = 0.0
    for piece in pieces:
        part = loss.part(batching.collate(source, indices[piece], budget=0), whole)
        part.backward()
        total += float(part.detach())
    return total, {n: p.grad.clone() for n, p in trained(learner).items() if p.grad is not None}


class Padded:
    """The same model run padded, as anybody would, with eager attention and masks."""

    def __init__(self, learner, side: str) -> None:
        self.learner, self.side = learner, side

    def hidden(self, rows, role, *, embeddings=None):
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if self.side == "left" else slice(0, len(row))
            ids[i, span] = torch.as_tensor(row)
            mask[i, span] = 1
        network = self.learner.network
        inputs = self.learner.embedding(ids)
        if embeddings is not None:
            first = self.learner.vocabulary.first
            slots = (ids >= first) & (ids < first + self.learner.vocabulary.vectors)
            inputs = inputs.masked_scatter(slots[..., None], embeddings)
        network.set_attn_implementation("eager")
        try:
            with self.learner.roles.using(role):
                output = network(
                    inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True,
                    use_cache=False,
                )  # fmt: skip
        finally:
            network.set_attn_implementation("baton_packed")
        return ids, mask.bool(), output.hidden_states[-1], output.logits

    def encoded(self, rows, role):
        ids, mask, hidden, _ = self.hidden(rows, role)
        first = self.learner.vocabulary.first
        memory = (ids >= first) & (ids < first + self.learner.vocabulary.vectors) & mask
        return hidden, memory, mask & ~memory

    def reading_loss(self, asks, *, mse: float) -> torch.Tensor:
        vocabulary = self.learner.vocabulary
        rows = vocabulary.encoder_ids([TEXTS[i] for _, _, d in asks for i in d])
        hidden, memory, text = self.encoded(rows, ENCODER)
        vectors = hidden[memory].view(len(rows), -1, hidden.shape[-1])
        means = [(hidden * m[..., None]).sum(1) / m.sum(1, keepdim=True) for m in (text, memory)]
        distance = ((means[0] - means[1]) ** 2).mean()
        return self.answers(asks, vectors) + mse * distance

    def answers(self, asks, vectors) -> torch.Tensor:
        prompter = Prompter(self.learner.vocabulary)
        said = [(*prompter.question(q, 2), a) for q, a, _ in asks]
        turns = prompter.encode(said, max_length=400)
        ids, mask, _, logits = self.hidden(
            [t.tokens for t in turns], DECODER, embeddings=vectors.flatten()
        )
        labels = ids.masked_fill(~mask, -100)
        for i, turn in enumerate(turns):
            start = int(mask[i].nonzero()[0])
            labels[i, : start + turn.prompt] = -100
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_stage_2_is_cross_entropy_and_a_tenth_of_the_distance_however_padded(learner, side, kind):
    model = learner("stage2", kind=kind)
    loss = ReadingLoss(model, Stage2(top_k=2), compute_dtype=FP32)
    source = source_of(model, ASKS, queries=False)
    expected = Padded(model, side).reading_loss(ASKS, mse=0.1)
    theirs = gradients(model, expected)
    value, ours = by_micro_batches(model, loss, source, size=5)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    close(ours, theirs)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_loss_of_a_step_does_not_depend_on_the_micro_batch(learner, size):
    model = learner("stage2")
    loss = ReadingLoss(model, Stage2(top_k=2), compute_dtype=FP32)
    source = source_of(model, ASKS, queries=False)
    expected, theirs = by_micro_batches(model, loss, source, size=5)
    value, ours = by_micro_batches(model, loss, source, size=size)
    assert value == pytest.approx(expected, rel=1e-5)
    close(ours, theirs)


def test_the_average_of_micro_batches_is_the_references(learner):
    model = learner("stage2")
    train = ClaraTrain(ce_average="microbatch")
    loss = ReadingLoss(model, Stage2(top_k=2, train=train), compute_dtype=FP32)
    asks = [ASKS[0], ASKS[4], ASKS[1], ASKS[3]]  # two short answers, then two long ones
    value, _ = by_micro_batches(model, loss, source_of(model, asks, queries=False), size=2)
    plain = Padded(model, "left")
    expected = [float(plain.reading_loss(asks[i : i + 2], mse=0.1).detach()) for i in (0, 2)]
    assert value == pytest.approx(sum(expected) / 2, rel=1e-5)
    whole = float(plain.reading_loss(asks, mse=0.1).detach())
    assert abs(value - whole) > 1e-3, "answers of different lengths weigh differently"


def test_either_term_can_be_left_out(learner):
    model = learner("stage1")
    asks = [(q, a, d[:1]) for q, a, d in ASKS]
    source = source_of(model, asks, queries=False)

    def value(**changes):
        loss = ReadingLoss(model, Stage1(**changes), compute_dtype=FP32)
        return by_micro_batches(model, loss, source, size=5)[0]

    both, answers, distance = value(), value(mse_loss=False), value(qa_loss=False)
    assert both == pytest.approx(answers + distance, rel=1e-6)
    assert distance > 1e-4
    assert value(mse_weight=0.2, qa_loss=False) == pytest.approx(2 * distance, rel=1e-6)


def test_dev_losses_are_cross_entropy_alone(learner):
    model = learner("stage2")
    loss = ReadingLoss(model, Stage2(top_k=2), compute_dtype=FP32)
    source = source_of(model, ASKS, queries=False)
    indices = np.arange(len(ASKS))
    summed = float(loss(batching_of(model).collate(source, indices, budget=0)).detach())
    expected = float(Padded(model, "left").reading_loss(ASKS, mse=0.0).detach())
    assert summed / int(source.labelled(indices).sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_stage_3_reads_the_documents_it_chose_and_learns_to_choose(learner, size, side):
    model = learner("stage3")
    stage = Stage3(top_k=2)
    source = source_of(model, CANDIDATES, queries=True)
    assert len({len(d) for _, _, d in CANDIDATES}) > 1, "rows differ in their candidates"
    value, ours = by_micro_batches(
        model, RetrievalLoss(model, stage, compute_dtype=FP32), source, size=size, share=True
    )
    plain = Padded(model, side)
    vocabulary = model.vocabulary
    with torch.no_grad():
        hidden, memory, _ = plain.encoded(vocabulary.encoder_ids(TEXTS), ENCODER)
        documents = hidden[memory].view(len(TEXTS), -1)
    queries = vocabulary.encoder_ids([q for q, _, _ in CANDIDATES])
    hidden, memory, _ = plain.encoded(queries, REASONER)
    best = []
    for query, (_, _, numbers) in zip(
        hidden[memory].view(len(queries), -1), CANDIDATES, strict=True
    ):
        own = documents[list(numbers)]
        best.append(select(cosine_similarity(query[None], own), own, 2, temperature=0.02)[0])
    expected = plain.answers(CANDIDATES, torch.cat(best))
    theirs = gradients(model, expected)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    for name in ours:
        scale = float(theirs[name].abs().max())
        assert torch.allclose(ours[name], theirs[name], rtol=1e-2, atol=1e-3 * scale), name
    assert set(trained(model)) == set(ours)
    assert any("query_reasoner" in name and ours[name].abs().sum() > 0 for name in ours)
    assert not any(".encoder." in name for name in ours)
    assert ours["base_model.model.model.embed_tokens.memory"].abs().sum() > 0


def test_documents_are_encoded_without_dropout_in_stage_3(learner):
    model = learner("stage3", dropout=0.5)
    model.model.train()
    loss = RetrievalLoss(model, Stage3(top_k=2), compute_dtype=FP32)
    source = source_of(model, CANDIDATES, queries=True)
    batch = batching_of(model, share=True).collate(source, np.arange(2), budget=0)
    plain = copy.copy(batch)
    with torch.no_grad():
        model.model.eval()
        expected = loss.chosen(plain)
        model.model.train()
        torch.manual_seed(1)
        found = loss.chosen(batch)
    assert model.model.training, "dropout is on again afterwards"
    # Whatever the queries' dropout chose, every vector is one that was encoded without any.
    rows = {tuple(row.tolist()) for row in expected}
    everything = {tuple(r.tolist()) for r in _all_vectors(model, batch)}
    assert {tuple(row.tolist()) for row in found} <= everything
    assert rows <= everything


def _all_vectors(model, batch):
    from baton.pipelines.clara.losses import encode

    model.model.eval()
    with torch.no_grad():
        return encode(model, batch.documents, ENCODER).vectors.flatten(0, 1)


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_recomputed_activations_give_the_same_gradients_with_dropout_on(learner, stage):
    plain, saving = (learner(stage, dropout=0.3, checkpointing=c) for c in (False, True))
    calls = []
    for layer in saving.network.model.layers:
        layer.mlp.register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled()) if torch.is_grad_enabled() else None
        )
    found = []
    for model in (plain, saving):
        model.model.train()
        if stage == "stage2":
            loss = ReadingLoss(model, Stage2(top_k=2), compute_dtype=FP32)
            source = source_of(model, ASKS, queries=False)
        else:
            loss = RetrievalLoss(model, Stage3(top_k=2, train=Stage3Train()), compute_dtype=FP32)
            source = source_of(model, CANDIDATES, queries=True)
        torch.manual_seed(5)
        found.append(by_micro_batches(model, loss, source, size=5, share=stage == "stage3"))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
    # Two layers, run for two roles, each once forward and once again backward.
    assert len(calls) == 2 * 2 * 2


@pytest.mark.slow
def test_compiled_layers_learn_the_same_in_every_role(learner):
    found = []
    for compiled in (False, True):
        model = learner("stage3")
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            compile_layers(model.network, backend="eager")
        loss = RetrievalLoss(model, Stage3(top_k=2), compute_dtype=FP32)
        source = source_of(model, CANDIDATES, queries=True)
        found.append(by_micro_batches(model, loss, source, size=5, share=True))
    # Of one layer: documents without gradients, queries and answers, each with its adapter.
    assert counters["stats"]["unique_graphs"] >= 3
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
