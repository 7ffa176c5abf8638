"""Prompts, labels and encoder inputs, word for word."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from baton.errors import DataError, ModelError
from baton.pipelines.clara.memory import Vocabulary, is_reserved_in
from baton.pipelines.clara.prompt import PARAPHRASES, Prompter
from baton.pipelines.clara.rows import AskRow, SayRow

# As Mistral's: one user turn, a system role refused.
REFUSES = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
    " [/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SAY = SayRow(
    number=3,
    line=3,
    kind="qa",
    document="d",
    questions=("Who?", "When?"),
    answers=("Nobody.", "In 1250"),
)
ASK = AskRow(
    number=1, line=1, question="When?", documents=("a", "b"), golds=("1250", "then"), positives=None
)
SLOT = "<MEM0><MEM1><SEP>"


@pytest.fixture
def prompter(base):
    def make(template: str | None = None) -> Prompter:
        tokenizer = AutoTokenizer.from_pretrained(base())
        if template is not None:
            tokenizer.chat_template = template
        return Prompter(Vocabulary.extend(tokenizer, vectors=2, encoder_tokens=11))

    return make


def whole(prompter: Prompter, row, documents: int) -> tuple[str, str]:
    """What the row's tokens say: the prompt, and what is learnt."""
    [turn] = prompter.encode([prompter.messages(row, documents=documents, seed=1)], max_length=999)
    tokenizer = prompter.tokenizer
    return tokenizer.decode(turn.tokens[: turn.prompt]), tokenizer.decode(
        turn.tokens[turn.prompt :]
    )


def test_stage_1_asks_for_all_pairs_of_a_row(prompter):
    assert whole(prompter(), SAY, 1) == (
        "<|im_start|>system\nYou are a helpful assistant. Given a document, your task is to"
        " generate some single questions to cover all key information of the document and answer"
        f" them sequentially.<|im_end|>\n<|im_start|>user\nBackground:\n{SLOT}<|im_end|>\n"
        "<|im_start|>assistant\n",
        "Question: Who?\nAnswer: Nobody.\nQuestion: When?\nAnswer: In 1250<|im_end|>\n",
    )


def test_stages_2_and_3_ask_one_question_of_several_documents(prompter):
    assert whole(prompter(), ASK, 2) == (
        "<|im_start|>system\nYou are a helpful assistant. Your task is to extract relevant"
        " information from provided documents and to answer to questions as briefly as possible."
        f"<|im_end|>\n<|im_start|>user\nBackground:\n{SLOT}{SLOT}\n\nQuestion:When?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "1250<|im_end|>\n",
    )


def test_a_template_without_a_system_role_gets_one_user_turn(prompter):
    said = prompter(REFUSES)
    prompt, learnt = whole(said, ASK, 1)
    assert prompt == (
        "[INST] You are a helpful assistant. Your task is to extract relevant information from"
        " provided documents and to answer to questions as briefly as possible.\nBackground:\n"
        f"{SLOT}\n\nQuestion:When? [/INST]"
    )
    assert learnt == "1250<|im_end|>"
    assert said.end_of_turn == said.tokenizer.eos_token_id


def test_thinking_is_switched_off(prompter):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}NO THOUGHT{% endif %}{% endif %}"
    )
    said = prompter(template)
    # What opens a turn to be answered is not what a finished one has: the finished one decides.
    assert said.prompt_text("s", "u").endswith("<|im_start|>assistant\n")
    empty = "{% if m.role == 'assistant' and enable_thinking is false %}NO THOUGHT{% endif %}"
    always = template.replace("{{ m.content }}", empty + "{{ m.content }}")
    assert prompter(always).prompt_text("s", "u").endswith("assistant\nNO THOUGHT")


def test_paraphrase_prompts_follow_from_seed_and_row(prompter):
    said = prompter()
    rows = [
        SayRow(number=n, line=n, kind="paraphrase", document="d", questions=(), answers=("x", "y"))
        for n in range(200)
    ]
    users = [said.messages(row, documents=1, seed=7)[1] for row in rows]
    assert users == [said.messages(row, documents=1, seed=7)[1] for row in rows]
    assert users != [said.messages(row, documents=1, seed=8)[1] for row in rows]
    assert set(users) == {template.replace("{docs}", SLOT) for template in PARAPHRASES}
    system, _, answer = said.messages(rows[0], documents=1, seed=7)
    assert answer == "x"
    assert system == (
        "You are a helpful assistant. Your task is follow the instructions to paraphrase the"
        " background information."
    )
    assert all(template.count("{docs}") == 1 for template in PARAPHRASES)


def test_a_long_answer_is_cut_on_the_right_and_a_long_prompt_dropped(prompter):
    said = prompter()
    conversation = ("s", "u", "one two three four five six seven")
    [full] = said.encode([conversation], max_length=999)
    assert not full.is_cut
    [cut] = said.encode([conversation], max_length=full.prompt + 3)
    assert cut.tokens == full.tokens[: full.prompt + 3]
    assert cut.is_cut
    assert said.encode([conversation], max_length=full.prompt) == [None]


def test_the_encoder_reads_enc_text_and_eos_then_the_memory_tokens(prompter):
    vocabulary = prompter().vocabulary
    tokenizer = vocabulary.tokenizer
    [ids] = vocabulary.encoder_ids(["Arden"])
    assert tokenizer.decode(ids) == "<ENC>Arden<|im_end|><MEM0><MEM1>"
    [long] = vocabulary.encoder_ids(["Arden lies on the river Wye and so does everything else"])
    # The whole string is cut, so a long text loses its eos.
    assert len(long) == 11 + 2
    assert tokenizer.eos_token_id not in long
    assert long[-2:] == vocabulary.memory_ids


def test_a_bos_of_the_base_is_used(base):
    tokenizer = AutoTokenizer.from_pretrained(base())
    tokenizer.bos_token = "<|endoftext|>"
    vocabulary = Vocabulary.extend(tokenizer, vectors=1, encoder_tokens=50)
    [ids] = vocabulary.encoder_ids(["Arden"])
    assert tokenizer.decode(ids) == "<ENC><|endoftext|>Arden<|im_end|><MEM0>"


def test_added_tokens_are_numbered_from_the_end_of_the_vocabulary(base):
    tokenizer = AutoTokenizer.from_pretrained(base())
    before = len(tokenizer)
    vocabulary = Vocabulary.extend(tokenizer, vectors=3, encoder_tokens=9)
    added = ["<MEM0>", "<MEM1>", "<MEM2>", "<ENC>", "<SEP>", "<AE>"]
    assert tokenizer.convert_tokens_to_ids(added) == list(range(before, before + 6))
    assert vocabulary.memory_ids == [before, before + 1, before + 2]
    with pytest.raises(ModelError, match="has a token <MEM0> already"):
        Vocabulary.extend(tokenizer, vectors=3, encoder_tokens=9)


def test_a_tokenizer_without_a_template_is_refused(base):
    tokenizer = AutoTokenizer.from_pretrained(base())
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Prompter(Vocabulary.extend(tokenizer, vectors=1, encoder_tokens=9))


def test_reserved_words_are_found():
    assert is_reserved_in("x <MEM12> y") == "<MEM12>"
    assert is_reserved_in("a <MEM> or <mem0> or <ENCODE>") is None
