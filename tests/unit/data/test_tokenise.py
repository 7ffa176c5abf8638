"""Which tokens carry loss, under the templates people use, and the files tokens are kept in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chat_families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.data.tokenise import ChatEncoder, TokenFile, TokenWriter, write_turns
from baton.errors import DataError

ANSWERS = {
    "plain": "Drink water and see a doctor.",
    "chinese": "可以适量服用，但要听医生的话。",
    "many lines": "one\n\ntwo\n  five\n\n\nthree",
    "emoji": "🙂 sleep 👩‍⚕️🙂",
    "in the question": "headache",
    "a role": "assistant",
    "starts like the template": "[/INST] user\nassistant",
    "looks special": "the tag <|im_end|> ends </s> a <end_of_turn> turn <think>",
    "one letter": "A",
    "accents": "é ﬁ Ａ",
    "in brackets": "[1] and (2)",
}
QUESTION = "What helps against a headache? 头疼"


@pytest.fixture(scope="module")
def tokenizers():
    return {name: family.tokenizer() for name, family in FAMILIES.items()}


def encoder(tokenizer, *, system=None, max_length=10_000):
    return ChatEncoder(tokenizer, system=system, max_length=max_length)


def encode(tokenizer, question, answer, **options):
    return encoder(tokenizer, **options).encode([(question, answer)])[0]


def trained_text(tokenizer, turn):
    return tokenizer.decode(turn.tokens[turn.prompt :], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ANSWERS)
def test_the_answer_and_its_end_of_turn_carry_loss_and_nothing_else(name, kind, tokenizers):
    tokenizer, answer = tokenizers[name], ANSWERS[kind]
    turn = encode(tokenizer, QUESTION, answer)
    assert trained_text(tokenizer, turn) == answer + FAMILIES[name].end
    assert turn.tokens[-1] == tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    assert QUESTION in tokenizer.decode(turn.tokens[: turn.prompt])
    assert not turn.is_cut


@pytest.mark.parametrize("name", FAMILIES)
def test_all_tokens_together_are_the_rendered_conversation(name, tokenizers):
    tokenizer = tokenizers[name]
    turn = encode(tokenizer, QUESTION, ANSWERS["plain"])
    conversation = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWERS["plain"]},
    ]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False).strip()
    end = FAMILIES[name].end
    assert tokenizer.decode(turn.tokens) == (whole if whole.endswith(end) else whole + end)


def same_prompt(tokenizer, answer):
    turn = encode(tokenizer, QUESTION, answer)
    asked = tokenizer(encoder(tokenizer).prompt_text(QUESTION), add_special_tokens=False)
    return turn.tokens[: turn.prompt] == asked["input_ids"]


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "mistral", "gemma"])
def test_the_prompt_of_training_is_the_prompt_of_generation(name, kind, tokenizers):
    assert same_prompt(tokenizers[name], ANSWERS[kind])


@pytest.mark.parametrize("name", ["qwen3", "glm4", "deepseek-r1"])
def test_a_template_that_opens_a_thought_has_one_prompt_for_both(name, tokenizers):
    assert same_prompt(tokenizers[name], ANSWERS["plain"])


def test_an_answer_that_the_end_of_turn_contains_is_still_found(tokenizers):
    turn = encode(tokenizers["qwen3"], QUESTION, "end")
    assert trained_text(tokenizers["qwen3"], turn) == "end<|im_end|>"


@pytest.mark.parametrize(("name", "answer"), [("mistral", "(b) Aspirin"), ("qwen2.5", "\n\nthree")])
def test_a_token_across_the_edge_goes_to_neither_side(name, answer, tokenizers):
    tokenizer = tokenizers[name]
    turn = encode(tokenizer, QUESTION, answer)
    assert trained_text(tokenizer, turn).lstrip(" ") == answer + FAMILIES[name].end
    assert same_prompt(tokenizer, answer)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("qwen3", "<think>cold?</think>Sleep."),
        ("deepseek-r1", "<think>\ncold?\n</think>\n\nSleep."),
        ("llama3", " Sleep. "),
        ("gemma", "Sleep.\n"),
    ],
)
def test_an_answer_that_the_template_would_change_is_trained_as_it_is(name, answer, tokenizers):
    turn = encode(tokenizers[name], QUESTION, answer)
    assert trained_text(tokenizers[name], turn) == answer + FAMILIES[name].end


def test_a_leading_space_belongs_to_the_answer(tokenizers):
    turn = encode(tokenizers["qwen2.5"], QUESTION, "  five")
    assert trained_text(tokenizers["qwen2.5"], turn) == "  five<|im_end|>"
    assert same_prompt(tokenizers["qwen2.5"], "  five")


def test_qwen_answers_under_its_default_system_prompt_unless_told_another(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    default = encoder(tokenizer).prompt_text("Why?")
    assert default == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    other = encoder(tokenizer, system="你是医生。").prompt_text("Why?")
    assert other.startswith("<|im_start|>system\n你是医生。<|im_end|>\n<|im_start|>user")
    turn = encode(tokenizer, "Why?", "Because.", system="你是医生。")
    assert tokenizer.decode(turn.tokens[: turn.prompt]) == other
    assert trained_text(tokenizer, turn) == "Because.<|im_end|>"


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_prompt_that_the_template_refuses_is_said(name, tokenizers):
    with pytest.raises(DataError):
        encode(tokenizers[name], QUESTION, "Sleep.", system="You are a doctor.")


def test_no_second_begin_token_is_added(tokenizers):
    for name in ("llama3", "mistral", "gemma", "deepseek-r1"):
        turn = encode(tokenizers[name], QUESTION, "Sleep.")
        begin = tokenizers[name].convert_tokens_to_ids(FAMILIES[name].bos)
        assert turn.tokens.count(begin) == 1
        assert turn.tokens[0] == begin


def test_an_answer_too_long_is_cut_and_loses_its_end(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    full = encode(tokenizer, QUESTION, ANSWERS["plain"])
    size = len(full.tokens)
    assert encode(tokenizer, QUESTION, ANSWERS["plain"], max_length=size) == full
    for length in range(full.prompt + 1, size):
        cut = encode(tokenizer, QUESTION, ANSWERS["plain"], max_length=length)
        assert cut.is_cut
        assert (cut.tokens, cut.prompt) == (full.tokens[:length], full.prompt)
    for length in (1, full.prompt - 1, full.prompt):
        assert encode(tokenizer, QUESTION, ANSWERS["plain"], max_length=length) is None


class Slow:
    """A tokenizer of Python code: no offsets, the same tokens."""

    is_fast = False

    def __init__(self, fast) -> None:
        self._fast = fast

    def __getattr__(self, name):
        return getattr(self._fast, name)

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self._fast(text, **options)


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "glm4"])
def test_a_tokenizer_without_offsets_gives_the_same_samples(name, kind, tokenizers):
    fast = tokenizers[name]
    assert encode(Slow(fast), QUESTION, ANSWERS[kind]) == encode(fast, QUESTION, ANSWERS[kind])


def test_a_batch_is_encoded_row_by_row(tokenizers):
    tokenizer = tokenizers["llama3"]
    pairs = [(QUESTION, answer) for answer in ANSWERS.values()]
    one_by_one = [encode(tokenizer, *pair) for pair in pairs]
    assert encoder(tokenizer).encode(pairs) == one_by_one
    assert encoder(tokenizer).encode([]) == []


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizers):
    bare = FAMILIES["qwen2.5"].tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError) as caught:
        encoder(bare)
    assert str(caught.value) == (
        "the tokenizer has no chat template; use an instruction-tuned model"
    )


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30).map(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(words.filter(len), words.filter(len))
def test_any_question_and_answer_are_placed_right(question, answer):
    tokenizer = QWEN
    turn = encode(tokenizer, question, answer)
    assert trained_text(tokenizer, turn) == answer + "<|im_end|>"
    prompt = encoder(tokenizer).prompt_text(question)
    assert tokenizer.decode(turn.tokens[: turn.prompt]) == prompt


QWEN = FAMILIES["qwen2.5"].tokenizer()

# --- the files ----------------------------------------------------------------------------------

sample = st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40).flatmap(
    lambda tokens: st.tuples(st.just(tokens), st.integers(0, len(tokens)))
)


def write(folder: Path, rows, *, vocab_size=2**16, name="train") -> TokenFile:
    writer = TokenWriter(folder, name, vocab_size=vocab_size)
    for tokens, prompt in rows:
        writer.append(tokens, prompt)
    writer.finish()
    return TokenFile(folder, name)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(sample, max_size=20), st.sampled_from([2**16, 2**16 + 1]))
def test_what_is_written_is_what_is_read(tmp_path, rows, vocab_size):
    file = write(tmp_path, rows, vocab_size=vocab_size)
    assert len(file) == len(rows)
    assert [(t.tolist(), p) for t, p in map(file.sample, range(len(rows)))] == rows
    everything = np.arange(len(rows))[::-1]
    assert file.lengths(everything).tolist() == [len(t) for t, _ in rows[::-1]]
    assert file.labelled(everything).tolist() == [len(t) - max(p, 1) for t, p in rows[::-1]]
    width = (tmp_path / "train.tokens").stat().st_size
    assert width == sum(len(t) for t, _ in rows) * (2 if vocab_size <= 2**16 else 4)


def test_tokens_beyond_16_bits_survive(tmp_path):
    file = write(tmp_path, [([70_000, 151_645, 3], 1)], vocab_size=151_936)
    tokens, prompt = file.sample(0)
    assert (tokens.tolist(), prompt, tokens.dtype) == ([70_000, 151_645, 3], 1, np.int64)


def test_a_kill_before_the_end_leaves_no_file_under_its_name(tmp_path):
    writer = TokenWriter(tmp_path, "train", vocab_size=10)
    writer.append([1, 2, 3], 1)
    assert not any(path.name.startswith("train") for path in tmp_path.iterdir())
    writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "train.index",
        "train.json",
        "train.tokens",
    ]


@pytest.mark.parametrize("change", [-2, 2])
def test_a_token_file_of_another_size_is_refused(change, tmp_path):
    write(tmp_path, [([1, 2, 3], 1), ([4, 5], 1)])
    path = tmp_path / "train.tokens"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(DataError) as caught:
        TokenFile(tmp_path, "train")
    assert str(caught.value) == (
        f"{path}: {10 + change} bytes, expected 10; remove the task's data folder to have it made"
        " again"
    )


@pytest.mark.parametrize("kept", [0, 8, 16])
def test_an_index_of_another_size_is_refused(kept, tmp_path):
    write(tmp_path, [([1, 2, 3], 1), ([4, 5], 1)])
    path = tmp_path / "train.index"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError):
        TokenFile(tmp_path, "train")


def test_pairs_are_counted_and_those_that_cannot_fit_are_named(tmp_path, tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    pairs = [("Why?", "Because."), ("Why? " * 60, "Because."), ("Why?", "Because. " * 60)] * 3
    limit = 100
    dropped: list[int] = []
    counts = write_turns(
        encoder(tokenizer, max_length=limit),
        iter(pairs),
        TokenWriter(tmp_path, "train", vocab_size=len(tokenizer)),
        on_dropped=dropped.append,
        batch=2,
    )
    file = TokenFile(tmp_path, "train")
    everything = np.arange(len(file))
    assert dropped == [1, 4, 7]
    assert counts == {
        "samples": 6,
        "tokens": int(file.lengths(everything).sum()),
        "labelled_tokens": int(file.labelled(everything).sum()),
        "answers_cut": 3,
        "prompts_too_long": 3,
    }
    assert len(file) == 6
    assert file.lengths(everything).max() == limit
    for index in (0, 2, 4):
        tokens, prompt = file.sample(index)
        assert tokenizer.decode(tokens[prompt:]) == "Because.<|im_end|>"
