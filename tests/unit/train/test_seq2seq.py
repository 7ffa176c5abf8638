"""T5 through the one loop: the loss of a padded batch, rates, resuming, memory."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.stage import Outcome
from baton.train.layers import plain_layers
from baton.train.loop import ReadAhead
from baton.train.loss import linear_cross_entropy
from baton.train.metrics import read_lines
from baton.train.seq2seq import Seq2SeqLoss, compile_blocks


@pytest.fixture(scope="session")
def t5():
    """The helpers beside this file: tiny T5s, pairs, loops."""
    spec = util.spec_from_file_location("t5_lab", Path(__file__).with_name("t5_lab.py"))
    lab = util.module_from_spec(spec)
    sys.modules["t5_lab"] = lab
    spec.loader.exec_module(lab)
    return lab


def curve(run, key="loss"):
    lines = read_lines(run.root / "train" / "metrics.jsonl")
    return [line[key] for line in lines if key in line]


# --- batches and their loss ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"pad_to": 1}, {"pad_to": 16, "fixed_rows": True}])
def test_the_loss_is_that_of_transformers_on_labels_with_pads_ignored(options, t5):
    pairs, batching = t5.Pairs.drawn(5), t5.padded(**options)
    ours, theirs = t5.network().eval(), t5.network().eval()
    batch = batching.collate(pairs, np.arange(5), budget=320)
    loss = Seq2SeqLoss(ours, compute_dtype=torch.float32)(batch)
    loss.backward()

    width, depth = 14, 14
    ids, mask = torch.full((5, width), t5.PAD), torch.zeros(5, width)
    labels = torch.full((5, depth), -100)
    for row, (tokens, prompt) in enumerate(pairs.rows):
        ids[row, :prompt], mask[row, :prompt] = torch.tensor(tokens[:prompt]), 1
        labels[row, : len(tokens) - prompt] = torch.tensor(tokens[prompt:])
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    (expected * (labels != -100).sum()).backward()
    assert loss.item() == pytest.approx(expected.item() * int((labels != -100).sum()), rel=1e-5)
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(our.grad, their.grad, rtol=1e-3, atol=1e-4)


def test_a_response_starts_after_the_start_token_and_its_eos_is_learned(t5):
    pairs = t5.Pairs([([11, 12, t5.EOS, 21, 22, t5.EOS], 3)])
    batch = t5.padded(pad_to=1).collate(pairs, np.arange(1), budget=9)
    assert batch.input_ids.tolist() == [[11, 12, t5.EOS]]
    assert batch.mask is None
    assert batch.decoder_ids.tolist() == [[t5.PAD, 21, 22]]
    assert batch.labels.tolist() == [21, 22, t5.EOS]
    assert batch.predicts.tolist() == [0, 1, 2]


def test_what_was_encoded_is_cast_for_all_layers_as_each_would(t5):
    pairs, batching = t5.Pairs.drawn(5), t5.padded()
    batch = batching.collate(pairs, np.arange(5), budget=320)
    ours, theirs = t5.network().eval(), t5.network().eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = Seq2SeqLoss(ours, compute_dtype=torch.bfloat16)(batch)
        encoded = theirs.encoder(input_ids=batch.input_ids, attention_mask=batch.mask)[0]
        decoded = theirs.decoder(
            input_ids=batch.decoder_ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=batch.mask,
            use_cache=False,
        )[0]
        expected = linear_cross_entropy(
            decoded.flatten(0, 1)[batch.predicts] * theirs.config.d_model**-0.5,
            theirs.lm_head.weight,
            batch.labels,
            compute_dtype=torch.bfloat16,
        )
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (our.grad - their.grad).norm() <= 1e-2 * their.grad.norm()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40),
    ranks=st.integers(1, 4),
    budget=st.integers(16, 300),
    pad_to=st.sampled_from([1, 8]),
)
def test_every_pair_is_in_one_micro_batch_that_fits(t5, lengths, ranks, budget, pad_to):
    pairs = t5.Pairs([([1] * (a + b), a) for a, b in lengths])
    batching = t5.padded(pad_to=pad_to)
    shares = batching.cut(pairs, np.arange(len(pairs)), ranks=ranks, budget=budget)
    assert len(shares) == ranks
    used = [position for share in shares for each in share for position in each]
    assert sorted(used) == list(range(len(pairs)))
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for each in (each for share in shares for each in share):
        widest = [max(-(-lengths[i][side] // pad_to) * pad_to for i in each) for side in (0, 1)]
        assert len(each) == 1 or len(each) * sum(widest) <= budget


def test_fixed_rows_give_one_shape_for_one_width(t5):
    batching, pairs = t5.padded(pad_to=16, fixed_rows=True), t5.Pairs.drawn(50, longest=16)
    shapes = {
        tuple(batching.collate(pairs, np.array(each), budget=128).decoder_ids.shape)
        for share in batching.cut(pairs, np.arange(50), ranks=3, budget=128)
        for each in share
    }
    assert shapes == {(4, 16)}


def test_compiled_blocks_compute_the_same_and_are_set_aside_for_generation(t5):
    net = t5.network().eval()
    ids = torch.tensor([[11, 12, t5.EOS]])
    plain = net(input_ids=ids, labels=ids).loss
    compile_blocks(net, backend="eager")
    assert torch.equal(net(input_ids=ids, labels=ids).loss, plain)
    blocks = [*net.encoder.block, *net.decoder.block]
    assert all("forward" in block.__dict__ for block in blocks)
    with plain_layers(net):
        assert not any("forward" in block.__dict__ for block in blocks)
        assert torch.equal(net(input_ids=ids, labels=ids).loss, plain)
    assert all("forward" in block.__dict__ for block in blocks)


# --- the learning rate --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_another_learning_rate_is_another_run(optimizer, task, t5):
    pairs, losses, moved = t5.Pairs.drawn(12), [], []
    for rate in (1e-4, 1e-3):
        run = task()
        config = replace(t5.CONFIG, max_steps=8, optimizer=optimizer, learning_rate=rate)
        loop = t5.loop_of(run, config, pairs)
        before = t5.network().shared.weight.detach()
        loop.run()
        losses.append(curve(run))
        moved.append((loop.model.shared.weight - before).norm().item())
    # Warm-up starts at a rate of 0, so the first two losses are the same.
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2:] != losses[1][2:]
    assert moved[1] > 3 * moved[0]


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_logged_rate_is_the_one_used_and_the_closed_form_at_every_step(
    schedule, optimizer, task, t5
):
    run, peak, warmup, total = task(), 3e-3, 3, 12
    config = replace(
        t5.CONFIG,
        max_steps=total,
        optimizer=optimizer,
        schedule=schedule,
        learning_rate=peak,
        warmup_steps=warmup,
    )
    loop = t5.loop_of(run, config, t5.Pairs.drawn(12))
    used, step = [], loop.optimizer.step

    def noted(*args, **kwargs):
        used.append(loop.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    loop.optimizer.step = noted
    loop.run()
    if schedule == "cosine":
        expected = [peak * n / warmup for n in range(warmup)] + [
            peak * 0.5 * (1 + math.cos(math.pi * n / (total - warmup)))
            for n in range(total - warmup)
        ]
    else:
        low, left = peak / 25, total - 1 - warmup
        expected = [
            low + (peak - low) * 0.5 * (1 - math.cos(math.pi * n / warmup)) for n in range(warmup)
        ] + [peak * 0.5 * (1 + math.cos(math.pi * n / left)) for n in range(left + 1)]
    assert used == pytest.approx(expected, abs=1e-12)
    assert curve(run, "learning_rate") == used


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_ten_resumes_in_a_row_end_in_the_same_bytes(optimizer, task, t5):
    pairs, dev = t5.Pairs.drawn(23), t5.Pairs.drawn(4, seed=3)
    # A save at every stop of the other run, so that what retention leaves is the same too.
    config = replace(
        t5.CONFIG, max_steps=22, optimizer=optimizer, eval_every_steps=4, save_every_steps=2
    )
    whole, cut = task(), task()
    t5.loop_of(whole, config, pairs, dev=dev).run()
    for stop_at in (*range(2, 22, 2), None):
        last = t5.loop_of(cut, config, pairs, dev=dev, stop_at=stop_at)
        assert last.run() is Outcome.FINISHED
    assert cut.legs == 11
    step = Path("train/checkpoints/step-000022")
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (whole.root / step / name).read_bytes() == (cut.root / step / name).read_bytes()
    metrics = "train/metrics.jsonl"
    assert (whole.root / metrics).read_bytes() == (cut.root / metrics).read_bytes()


class Answers:
    """A dev score that is made up; at `cut_at` there is no time for it."""

    def __init__(self, scores, cut_at=None):
        self.scores, self.cut_at = scores, cut_at

    def take(self, step):
        return None if step == self.cut_at else {"dev_bleu": self.scores[step]}


def test_the_best_checkpoint_is_the_best_by_score_and_outlives_the_others(task, t5):
    run = task()
    config = replace(t5.CONFIG, max_steps=10, eval_every_steps=2)
    scores = {2: 1.0, 4: 7.5, 6: 3.0, 8: 7.5, 10: 0.0}
    options = {"dev": t5.Pairs.drawn(2), "score": Answers(scores)}
    loop = t5.loop_of(run, config, t5.Pairs.drawn(12), **options)
    loop.run()
    assert loop.state.best[0] == 4
    assert curve(run, "dev_bleu") == list(scores.values())
    kept = {p.parent.name for p in run.root.glob("train/checkpoints/*/manifest.json")}
    assert kept == {"step-000004", "step-000008", "step-000010"}


def test_an_evaluation_cut_off_while_scoring_is_done_by_the_next_leg(task, t5):
    run, pairs = task(), t5.Pairs.drawn(12)
    config = replace(t5.CONFIG, max_steps=4, eval_every_steps=2)
    scores, dev = {2: 1.0, 4: 2.0}, t5.Pairs.drawn(2)
    first = t5.loop_of(run, config, pairs, dev=dev, score=Answers(scores, cut_at=2))
    assert first.run() is Outcome.HANDED_OVER
    assert curve(run, "dev_loss") == []
    second = t5.loop_of(run, config, pairs, dev=dev, score=Answers(scores))
    assert second.run() is Outcome.FINISHED
    assert curve(run, "dev_bleu") == [1.0, 2.0]


def test_reading_ahead_names_the_samples_of_the_step_to_come(task, t5):
    heard = []
    ahead = ReadAhead(2, lambda indices: heard.append(indices.tolist()))
    config = replace(t5.CONFIG, max_steps=5)
    loop = t5.loop_of(task(), config, t5.Pairs.drawn(12), read_ahead=ahead)
    loop.run()
    assert heard == [loop.cursor.at(step + 2).tolist() for step in range(5)]
