"""Which tokens carry loss, under the templates people use, and the files tokens are kept in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from baton.data.tokenise import ChatEncoder, TokenFile, TokenWriter, write_turns
from baton.errors import DataError

# --- the templates, as their models publish them (tools left out) -------------------------------

QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful"
    " assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first)"
    " or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set reasoning_content = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n')"
    ".split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.last or (not loop.last and reasoning_content) %}"
    "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n')"
    " + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
GLM4 = (
    "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}"
    "<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
# R1's distillations open the prompt with a thought that the finished turn does not have.
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)

CORPUS = [
    "高血压患者能吃党参吗？可以适量服用，但要听医生的话。",
    "What helps against a headache? Drink water, sleep enough and see a doctor.",
    "[INST] What is it? [/INST]It is a cold. [INST] A [/INST](b) Aspirin [/INST](c)",
    "one\n\ntwo\n\n\nthree\n four\n  five 🙂🙂 👩‍⚕️ assistant\nuser\nmodel\nsystem\n",
] * 4
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    template: str
    specials: tuple[str, ...]
    eos: str
    end: str
    """What closes an answer."""
    bos: str | None = None
    plain_added: tuple[str, ...] = ()
    """Added tokens that are not special, such as Qwen3's <think>."""
    metaspace: bool = False
    options: dict[str, str] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE(byte_fallback=self.metaspace, unk_token=None))
        if self.metaspace:
            # SentencePiece joins neither words nor scripts, but it does join "]" and "(".
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\n| ?\p{L}+| ?[^\s\p{L}]+|\s+"), "isolated"),
                    pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
                ]
            )
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
            alphabet = []
            extra = [f"<0x{byte:02X}>" for byte in range(256)]
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            tokenizer.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            extra = []
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=[*self.specials, *extra],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        if extra:
            # The trainer makes them special; they are only how bytes are spelt.
            state = json.loads(tokenizer.to_str())
            state["added_tokens"] = [
                token for token in state["added_tokens"] if token["content"] not in extra
            ]
            tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.add_tokens(
            [AddedToken(t, normalized=False, special=False) for t in self.plain_added]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=self.eos,
            bos_token=self.bos,
            chat_template=self.template,
        )


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "qwen2.5": Family(QWEN25, CHATML, "<|im_end|>", "<|im_end|>"),
    "qwen3": Family(QWEN3, CHATML, "<|im_end|>", "<|im_end|>", plain_added=("<think>", "</think>")),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(MISTRAL, ("<s>", "</s>"), "</s>", "</s>", bos="<s>", metaspace=True),
    "glm4": Family(
        GLM4,
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "gemma": Family(
        GEMMA,
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<end_of_turn>",
        bos="<bos>",
        metaspace=True,
    ),
    "deepseek-r1": Family(
        DEEPSEEK,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        plain_added=("<think>", "</think>"),
    ),
}
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
