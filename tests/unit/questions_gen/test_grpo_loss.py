"""The GRPO loss beside TRL's own: the same inputs, the same loss, the same gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from baton.pipelines.questions_gen.grpo_loss import (
    Drawn,
    GrpoLoss,
    advantages,
    token_losses,
    token_weights,
)
from baton.train import attention
from baton.train.batch import collate
from baton.train.logprobs import TokenLogprobs

VOCAB, PROMPT, NEW = 97, 5, 12
ROWS = 8
CLIP = 0.2
AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose probabilities are not all alike."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    place = tmp_path_factory.mktemp("policy")
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Completions of different lengths with prompts of different lengths, padded as TRL does."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (ROWS, PROMPT + NEW), generator=rng)
    prompt, new = torch.ones(ROWS, PROMPT).long(), torch.ones(ROWS, NEW).long()
    for row, length in enumerate((7, 12, 3, 12, 1, 9, 12, 5)):
        new[row, length:] = 0
    prompt[1, :2] = prompt[6, :3] = 0
    noise = torch.randn(2, ROWS, NEW, generator=rng)
    return {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": prompt,
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": new,
        "advantages": torch.tensor(advantages([0.1, 0.9, 0.4, 0.4, 1.0, 0.2, 0.0, 0.7], group=4)),
        # Around what the model says, so that some ratios are clipped and others are not.
        "old_noise": noise[0] * 0.3,
        "ref_noise": noise[1] * 0.5,
    }


@pytest.fixture(scope="module")
def oracle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """TRL's trainer for a way of aggregating; `parts` are the micro-batches of a step."""
    vocabulary = {str(i): i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")),
        pad_token="0",
        eos_token="1",
        unk_token="0",
    )

    def make(loss: str, *, parts: int, steps: int, beta: float, corrected: bool) -> GRPOTrainer:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                use_cpu=True,
                bf16=False,
                loss_type=loss,
                beta=beta,
                use_bias_correction_kl=corrected,
                epsilon=CLIP,
                temperature=0.7,
                num_generations=4,
                max_completion_length=NEW,
                per_device_train_batch_size=ROWS // parts // steps,
                gradient_accumulation_steps=parts,
                steps_per_generation=parts * steps,
                report_to=[],
            ),
            train_dataset=Dataset.from_dict({"prompt": ["3 4", "5 6"]}),
            processing_class=tokenizer,
        )
        trainer.current_gradient_accumulation_steps = parts
        trainer.model.train()
        return trainer

    return make


class Rows:
    """The rows of a padded batch as a token source: what baton packs."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.rows = []
        for i in range(ROWS):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
            new = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            self.rows.append((prompt + new, len(prompt)))

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        tokens, prompt = self.rows[index]
        return np.array(tokens, dtype=np.int64), prompt


def theirs(
    trainer: GRPOTrainer, batch: dict[str, torch.Tensor], rows: range, parts: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step on `rows`, micro-batch by micro-batch."""
    total = 0.0
    mask = batch["completion_mask"]
    size = len(rows) // parts
    for start in range(rows.start, rows.stop, size):
        span = slice(start, start + size)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        inputs = {name: batch[name][span] for name in names}
        loss = trainer._compute_loss(
            trainer.model,
            inputs
            | {
                "old_per_token_logps": batch["old"][span],
                "ref_per_token_logps": batch["ref"][span],
                "num_items_in_batch": mask.sum(),
            },
        )
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def known(folder: Path, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with old and reference log-probabilities around those of the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logps = (logits[:, PROMPT - 1 : -1] / 0.7).log_softmax(-1)
    now = logps.gather(2, batch["completion_ids"][..., None])[..., 0]
    return batch | {"old": now + batch["old_noise"], "ref": now + batch["ref_noise"]}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("parts", "steps"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("beta", "corrected"), [(0.0, False), (0.04, False), (0.04, True)])
def test_loss_and_gradients_are_those_of_trl(
    aggregation: Any,
    parts: int,
    steps: int,
    beta: float,
    corrected: bool,
    folder: Path,
    batch: dict[str, torch.Tensor],
    oracle: Callable[..., Any],
) -> None:
    full = known(folder, batch)
    mask = full["completion_mask"].bool()
    lengths = mask.sum(1).tolist()
    rows = range(ROWS // steps)  # the first optimizer step on the batch
    trainer = oracle(aggregation, parts=parts, steps=steps, beta=beta, corrected=corrected)
    expected, gradients = theirs(trainer, full, rows, parts)
    attention.register()
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention.NAME
    )
    weights = token_weights(
        [lengths[i] for i in rows],
        aggregation=aggregation,
        max_new_tokens=NEW,
        bnpo_samples=len(rows) // parts,
        batch_tokens=sum(lengths),
        steps_a_batch=steps,
    )
    logprobs = TokenLogprobs(network, compute_dtype=torch.float32, temperature=0.7)
    loss = GrpoLoss(logprobs, clip=CLIP, beta=beta, corrected=corrected)
    total = 0.0
    # Packed otherwise than in TRL's micro-batches: it must not matter.
    for part in (list(rows)[::2], list(rows)[1::2]):
        counts = torch.tensor([lengths[i] for i in part])
        drawn = Drawn(
            packed=collate(Rows(full), part, device=CPU),
            advantage=full["advantages"][part].float().repeat_interleave(counts),
            weight=torch.tensor([weights[i] for i in part]).repeat_interleave(counts),
            old=torch.cat([full["old"][i][mask[i]] for i in part]),
            reference=torch.cat([full["ref"][i][mask[i]] for i in part]),
        )
        value = loss(drawn)
        value.backward()
        total += float(value.detach())
    assert total == pytest.approx(expected, abs=1e-6, rel=1e-6)
    mine = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert mine.keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert largest > 1e-3, "nothing would be compared"
    for name, gradient in gradients.items():
        assert float((mine[name] - gradient).abs().max()) <= 1e-6 * max(1.0, largest), name
    _, clipped, tokens = loss.take()
    assert 0 < clipped < tokens == sum(lengths[i] for i in rows)


def test_bnpo_depends_on_the_micro_batch_and_the_others_do_not() -> None:
    lengths = [7, 12, 3, 12]

    def weights(aggregation: Any, size: int) -> list[float]:
        return token_weights(
            lengths,
            aggregation=aggregation,
            max_new_tokens=NEW,
            bnpo_samples=size,
            batch_tokens=sum(lengths),
        )

    for aggregation in AGGREGATIONS:
        is_same = weights(aggregation, 2) == weights(aggregation, 4)
        assert is_same == (aggregation != "bnpo")


@pytest.mark.parametrize("aggregation", ["grpo", "bnpo", "dapo"])
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_equal_losses_of_all_tokens_come_to_that_loss(aggregation: Any, lengths: list[int]) -> None:
    weights = token_weights(
        lengths,
        aggregation=aggregation,
        max_new_tokens=50,
        bnpo_samples=len(lengths),
        batch_tokens=sum(lengths),
    )
    total = sum(w * n for w, n in zip(weights, lengths, strict=True))
    assert total == pytest.approx(1.0)


def test_advantages_are_those_of_trl_for_a_group() -> None:
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.4, 1.0, 0.2, 0.0, 0.7])
    grouped = rewards.view(-1, 4)
    mean = grouped.mean(1).repeat_interleave(4)
    std = grouped.std(1).repeat_interleave(4)  # as in GRPOTrainer._generate_and_score_completions
    expected = (rewards - mean) / (std + 1e-4)
    assert advantages(rewards.tolist(), group=4) == pytest.approx(expected.tolist(), abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0.5, 3), st.floats(-2, 2))
@settings(deadline=None)
def test_advantages_have_mean_0_and_at_most_spread_1(
    rewards: list[float], scale: float, shift: float
) -> None:
    values = advantages(rewards, group=4)
    assert math.fsum(values) == pytest.approx(0, abs=1e-6)
    assert float(np.std(values, ddof=1)) <= 1 + 1e-9
    moved = advantages([scale * r + shift for r in rewards], group=4)
    if np.std(rewards) > 0.1:
        assert moved == pytest.approx(values, abs=5e-3)


def test_equal_rewards_teach_nothing() -> None:
    assert advantages([0.3] * 8, group=8) == [0.0] * 8


def test_rewards_that_are_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="no groups of 4"):
        advantages([0.1, 0.2, 0.3], group=4)


def test_the_gradient_stops_where_the_ratio_is_clipped_and_only_there() -> None:
    logps = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.5, -1.5, -0.5, -0.5])  # ratios 1.65, 1.65, 0.61, 0.61
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = token_losses(logps, old, None, advantage, clip=0.2, beta=0.0)
    found.loss.sum().backward()
    assert found.clipped.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert (logps.grad == 0).tolist() == [True, False, False, True]
    assert found.loss.tolist() == pytest.approx([-1.2, math.exp(0.5), -math.exp(-0.5), 0.8])


@given(st.floats(-8, -0.01), st.floats(-8, -0.01))
def test_the_divergence_is_never_negative_and_0_where_nothing_changed(a: float, b: float) -> None:
    found = token_losses(
        torch.tensor([a]),
        torch.tensor([a]),
        torch.tensor([b]),
        torch.tensor([0.0]),
        clip=0.2,
        beta=0.5,
    )
    d = b - a
    assert float(found.kl[0]) == pytest.approx(math.exp(d) - d - 1, rel=1e-3, abs=1e-5)
    assert float(found.loss[0]) == pytest.approx(0.5 * float(found.kl[0]), abs=1e-6)


def test_a_divergence_without_a_reference_is_an_error() -> None:
    row = torch.zeros(1)
    with pytest.raises(ValueError, match="reference"):
        token_losses(row, row, None, row, clip=0.2, beta=0.1)
