"""The loop through its public door: what a step computes, what stops it, what stays behind."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from baton.errors import ConfigError, NonFiniteError
from baton.stage import Outcome
from baton.train.cursor import Cursor
from baton.train.metrics import read_lines


def lines(run):
    return read_lines(run.root / "train" / "metrics.jsonl")


def curve(run, key="loss"):
    return [line[key] for line in lines(run) if key in line]


def checkpoints(run):
    folder = run.root / "train" / "checkpoints"
    return sorted(int(p.parent.name[5:]) for p in folder.glob("step-*/manifest.json"))


def weights(loop):
    return [p.detach().clone() for p in loop.parameters]


def assert_close(ours, theirs, *, absolute):
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() < absolute


# --- what a step computes -----------------------------------------------------------------------


def plain_training(folder, source, config, steps):
    """Padded batches, transformers' loss, torch's clipping: the loop as anybody would write it."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        foreach=False,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.max_steps)
    cursor = Cursor(len(source), config.batch_samples, config.seed)
    losses, norms = [], []
    for step in range(steps):
        rows = [source.rows[i] for i in cursor.at(step)]
        width = max(len(tokens) for tokens, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (tokens, prompt) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, max(prompt, 1) : len(tokens)] = torch.tensor(tokens[max(prompt, 1) :])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm).item())
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], losses, norms


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral with a window of 4"])
def test_five_steps_are_those_of_a_plain_padded_loop(name, task, settings, drawn):
    run, source = task(name), drawn(17, high=30)
    config = settings(
        max_steps=5, warmup_steps=2, learning_rate=1e-3, weight_decay=0.1, clip_norm=0.5
    )
    loop = run.loop(config, source)
    expected, losses, norms = plain_training(run.tiny.folder, source, config, 5)
    assert loop.run() is Outcome.FINISHED
    assert max(norms) > config.clip_norm
    assert curve(run) == pytest.approx(losses, rel=1e-5)
    assert curve(run, "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert_close(weights(loop), expected, absolute=1e-5)


def test_the_size_of_micro_batches_does_not_change_the_training(task, settings, drawn):
    source = drawn(13)
    found = {}
    for budget in (1, 25, 60, 100_000):
        run = task("llama")
        config = settings(
            max_steps=3, batch_samples=6, tokens_per_micro_batch=budget, learning_rate=1e-3
        )
        loop = run.loop(config, source)
        loop.run()
        found[budget] = (curve(run), curve(run, "grad_norm"), weights(loop))
    losses, norms, moved = found.pop(1)
    for other in found.values():
        assert other[0] == pytest.approx(losses, rel=1e-6)
        assert other[1] == pytest.approx(norms, rel=1e-5)
        assert_close(other[2], moved, absolute=1e-6)


def test_the_gradients_of_a_step_do_not_depend_on_the_cut(task, settings, drawn):
    source = drawn(6)
    found = []
    for budget in (1, 30, 100_000):
        seen = {}

        def keep(parameters, seen=seen):
            seen.update(enumerate(p.grad.clone() for p in parameters))

        run = task("qwen2", "lora")
        config = settings(max_steps=1, batch_samples=6, tokens_per_micro_batch=budget)
        loop = run.loop(config, source)
        # An optimizer hook is the one public place where a step's gradients can be seen.
        loop.optimizer.register_step_pre_hook(
            lambda *_, loop=loop, keep=keep: keep(loop.parameters)
        )
        loop.run()
        found.append(list(seen.values()))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert (one - two).abs().max() <= 1e-6 * max(1.0, one.abs().max().item())


def test_a_sample_without_labels_counts_for_nothing(task, settings, samples, drawn):
    rows = drawn(4).rows
    silent = samples([*rows, ([5, 6, 7, 8], 4)])
    one, two = task("llama"), task("llama")
    config = settings(max_steps=1, batch_samples=4)
    first = one.loop(config, samples(rows))
    first.run()
    second = two.loop(settings(max_steps=1, batch_samples=5), silent)
    second.run()
    assert curve(one) == pytest.approx(curve(two), rel=1e-6)
    assert_close(weights(first), weights(second), absolute=1e-6)


# --- how long it is ------------------------------------------------------------------------------


def seen_by(run, config, source, **options):
    """Samples that each step trained on, as the loss was given them."""
    heads = {tuple(tokens): index for index, (tokens, _) in enumerate(source.rows)}
    seen: list[int] = []

    def watch(loss):
        def watched(batch):
            ids, start = batch.input_ids[0].tolist(), 0
            for length in batch.lengths:
                seen.append(heads[tuple(ids[start : start + length])])
                start += length
            return loss(batch)

        return watched

    loop = run.loop(config, source, wrap=watch, **options)
    assert loop.run() is Outcome.FINISHED
    return seen, loop.state


def test_half_an_epoch_uses_half_the_samples(task, settings, drawn):
    seen, state = seen_by(task(), settings(epochs=0.5), drawn(11))
    assert len(seen) == len(set(seen)) == round(5.5) == state.samples
    assert state.step == 2


def test_three_epochs_use_every_sample_three_times(task, settings, drawn):
    seen, state = seen_by(task(), settings(epochs=3), drawn(7))
    assert sorted(seen) == sorted(list(range(7)) * 3)
    assert state.step == math.ceil(21 / 4)


def test_fewer_rows_than_a_batch_make_one_smaller_batch(task, settings, drawn):
    run = task()
    seen, state = seen_by(run, settings(epochs=1, batch_samples=16), drawn(3))
    assert sorted(seen) == [0, 1, 2]
    assert (state.step, len(curve(run))) == (1, 1)


def test_max_steps_go_on_beyond_the_epochs_with_full_batches(task, settings, drawn):
    seen, state = seen_by(task(), settings(epochs=1, max_steps=5), drawn(3))
    assert len(seen) == 20
    assert np.bincount(seen).max() - np.bincount(seen).min() <= 1
    assert state.step == 5


def test_what_is_logged_counts_samples_and_tokens(task, settings, drawn):
    run, source = task(), drawn(9)
    loop = run.loop(settings(epochs=2, log_every_steps=2), source, drawn(3, seed=8))
    loop.run()
    total = 2 * sum(len(tokens) for tokens, _ in source.rows)
    last = [line for line in lines(run) if "loss" in line][-1]
    assert (last["step"], last["samples"], last["tokens"], last["epoch"]) == (5, 18, total, 2.0)
    assert [line["step"] for line in lines(run) if "loss" in line] == [2, 4, 5]
    assert loop.state.labelled_tokens == 2 * sum(len(t) - max(p, 1) for t, p in source.rows)


# --- out of memory -------------------------------------------------------------------------------


def short_of_memory(limit, seen):
    """A loss on a card that holds `limit` tokens."""

    def wrap(loss):
        def limited(batch):
            size = sum(batch.lengths)
            if size > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            seen.append(size)
            return loss(batch)

        return limited

    return wrap


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    task, settings, drawn, caplog
):
    source = drawn(12, low=12, high=20)
    config = settings(max_steps=4, tokens_per_micro_batch=200, learning_rate=1e-3)
    small, large = task("llama"), task("llama")
    seen: list[int] = []
    loop = small.loop(config, source, wrap=short_of_memory(45, seen))
    assert loop.run() is Outcome.FINISHED
    expected = large.loop(
        settings(max_steps=4, tokens_per_micro_batch=50, learning_rate=1e-3), source
    )
    expected.run()
    assert loop.state.tokens_per_micro_batch in (25, 50)
    assert max(seen) <= 45
    assert curve(small) == pytest.approx(curve(large), rel=1e-6)
    assert_close(weights(loop), weights(expected), absolute=1e-6)
    assert "out of memory: micro-batches of 100 tokens instead of 200" in caplog.text


def test_later_legs_keep_the_smaller_micro_batch(task, settings, drawn, caplog):
    run, source = task("llama"), drawn(12)
    config = settings(max_steps=4, tokens_per_micro_batch=200)
    first = run.loop(config, source, stop_at=2, wrap=short_of_memory(25, []))
    first.run()
    smaller = first.state.tokens_per_micro_batch
    assert smaller < 200
    caplog.clear()
    second = run.loop(config, source, wrap=short_of_memory(25, []))
    assert second.run() is Outcome.FINISHED
    assert second.state.tokens_per_micro_batch == smaller
    assert "out of memory" not in caplog.text


def test_a_single_sample_that_does_not_fit_is_an_error_that_says_what_to_do(
    task, settings, samples
):
    source = samples([(list(range(3, 33)), 1)] * 4)
    loop = task().loop(settings(max_steps=1), source, wrap=short_of_memory(20, []))
    with pytest.raises(ConfigError) as caught:
        loop.run()
    assert str(caught.value) == (
        "out of memory with one sample of 30 tokens a micro-batch; set"
        " train.activation_checkpointing: true, shorten data.max_length, or use a smaller model or"
        " QLoRA"
    )


# --- not a number --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("every", [1, 5])
def test_a_loss_that_is_no_number_names_step_and_samples_and_is_never_saved(
    value, every, task, settings, drawn
):
    run, source = task(), drawn(40)
    config = settings(max_steps=10, save_every_steps=2, log_every_steps=every)
    bad = Cursor(40, 4, config.seed).at(4)
    tokens = source.rows[bad[1]][0]

    def wrap(loss):
        def spoilt(batch):
            row = batch.input_ids[0].tolist()
            found = any(row[i : i + len(tokens)] == tokens for i in range(len(row)))
            return loss(batch) * (value if found else 1.0)

        return spoilt

    with pytest.raises(NonFiniteError) as caught:
        run.loop(config, source, wrap=wrap).run()
    text = re.sub(r"gradient norm \S+,", "gradient norm N,", str(caught.value))
    assert text == (
        f"step 5: the loss is {value} and the gradient norm N, on training samples {bad.tolist()};"
        " the last checkpoint is from before it. Lower train.learning_rate, use precision: bf16 or"
        " fp32, or look at those samples"
    )
    assert checkpoints(run) == [2, 4]
    assert all(math.isfinite(loss) for loss in curve(run))


# --- evaluation, early stop, retention ----------------------------------------------------------


def test_the_dev_loss_is_the_mean_over_all_labelled_tokens(task, settings, drawn):
    run, dev = task("llama"), drawn(7, seed=3)
    loop = run.loop(settings(max_steps=1, learning_rate=0.0), drawn(4), dev)
    loop.run()
    model = AutoModelForCausalLM.from_pretrained(run.tiny.folder)
    total = count = 0
    with torch.no_grad():
        for tokens, prompt in dev.rows:
            ids = torch.tensor(tokens)[None]
            labels = ids.clone()
            labels[:, : max(prompt, 1)] = -100
            n = len(tokens) - max(prompt, 1)
            total, count = total + model(input_ids=ids, labels=labels).loss.item() * n, count + n
    assert curve(run, "dev_loss") == pytest.approx([total / count], rel=1e-5)


def test_evaluations_come_in_the_step_that_ends_an_epoch(task, settings, drawn):
    run = task()
    run.loop(settings(epochs=3), drawn(10), drawn(2)).run()
    # Epochs of 10 samples end at samples 10, 20 and 30, in batches of 4: in steps 3, 5 and 8.
    assert [line["step"] for line in lines(run) if "dev_loss" in line] == [3, 5, 8]


def worsening(run, config, source, dev, best_at):
    """Train while the dev loss falls to evaluation `best_at` and rises from there on."""
    count = 0

    def wrap(loss):
        def made_up(batch):
            nonlocal count
            if torch.is_grad_enabled():
                return loss(batch)
            count += 1
            labels = batch.labels.numel()
            return labels * torch.tensor(1.0 + abs(count - best_at))

        return made_up

    loop = run.loop(config, source, dev, wrap=wrap)
    return loop, loop.run()


def test_training_stops_when_the_dev_loss_has_not_improved_for_so_long(task, settings, drawn):
    run = task()
    config = settings(max_steps=30, eval_every_steps=2, early_stop_patience=3)
    loop, outcome = worsening(run, config, drawn(8), drawn(1), best_at=2)
    assert outcome is Outcome.FINISHED
    assert loop.state.step == 2 * (2 + 3)
    assert loop.state.best == (4, 1.0)
    again = run.loop(config, drawn(8), drawn(1))
    assert again.run() is Outcome.FINISHED
    assert again.state.step == 10


@pytest.mark.parametrize("keep_last", [2, 3])
def test_the_best_checkpoint_and_the_last_ones_are_kept(keep_last, task, settings, drawn):
    run = task()
    config = settings(max_steps=12, eval_every_steps=2, save_every_steps=3, keep_last=keep_last)
    loop, _ = worsening(run, config, drawn(8), drawn(1), best_at=2)
    assert loop.state.best == (4, 1.0)
    made = [2, 3, 4, 6, 8, 9, 10, 12]
    assert checkpoints(run) == sorted({4, *made[-keep_last:]})


# --- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "precision"),
    [("full", "fp32"), ("lora", "bf16"), ("full", "fp16"), ("qlora", "fp32")],
)
def test_a_run_cut_in_three_ends_in_the_same_bytes(method, precision, task, settings, drawn):
    source, dev = drawn(11), drawn(3, seed=2)
    config = settings(
        max_steps=7, eval_every_steps=3, precision=precision, log_every_steps=2, save_every_steps=2
    )
    whole, cut = task("llama", method), task("llama", method)
    straight = whole.loop(config, source, dev)
    assert straight.run() is Outcome.FINISHED
    for stop_at in (3, 5, None):
        last = cut.loop(config, source, dev, stop_at=stop_at)
        assert last.run() is Outcome.FINISHED
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(last), strict=True))
    assert lines(whole) == lines(cut)
    names = [
        path.relative_to(whole.root)
        for path in (whole.root / "train" / "checkpoints" / "step-000007").rglob("*")
        if path.is_file() and path.name not in ("timing.json", "manifest.json")
    ]
    assert len(names) >= 3
    for name in names:
        assert (whole.root / name).read_bytes() == (cut.root / name).read_bytes(), name


def test_a_stop_signal_ends_the_leg_after_the_step_with_its_work_saved(task, settings, drawn):
    run, source = task(), drawn(8)
    config = settings(max_steps=6)
    calls = 0

    def wrap(loss):
        def stopping(batch):
            nonlocal calls
            calls += 1
            if calls == 3:
                run.stop._handle(15, None)
            return loss(batch)

        return stopping

    loop = run.loop(config, source, wrap=wrap)
    assert loop.run() is Outcome.HANDED_OVER
    assert checkpoints(run) == [loop.state.step]
    assert 1 <= loop.state.step < 6
    after = run.loop(config, source)
    assert after.run() is Outcome.FINISHED
    alone = task()
    straight = alone.loop(config, source)
    straight.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(after), weights(straight), strict=True))


def test_another_base_or_data_on_resuming_is_refused_unless_allowed(task, settings, drawn):
    run, source = task(), drawn(8)
    config = settings(max_steps=4)
    run.loop(config, source, stop_at=2, identity={"base": "a", "data": "x"}).run()
    with pytest.raises(ConfigError) as caught:
        run.loop(config, source, identity={"base": "b", "data": "x"}).run()
    assert caught.value.problems[0] == "changed since the checkpoint of step 2: base: a -> b"
    allowed = run.loop(config, source, identity={"base": "b", "data": "x"}, allow_changed=("base",))
    assert allowed.run() is Outcome.FINISHED
