"""Rows as tokens: what carries loss, and what is shortened when a row is too long."""

from __future__ import annotations

import pytest
from chat_families import FAMILIES

from baton.errors import ConfigError
from baton.pipelines.raft.draw import Shown
from baton.pipelines.raft.format import load_format
from baton.pipelines.raft.prompt import Prompter

MEDICAL, BERKELEY = load_format("medical"), load_format("berkeley")
DOCUMENTS = (
    "头痛多为紧张所致。\n\n  1. 休息\n  2. 喝水",
    "Ice is cold. " * 12,
    "文档里没有 {{ braces }} 和 {% tags %},也没有\n    缩进。",
)
TARGET = "问题\n头痛怎么办?\n证据引用\n[文档1]:“头痛多为紧张所致。”\n"
NAMES = ("qwen2.5", "qwen3", "llama3", "mistral", "glm4", "gemma", "deepseek-r1")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: FAMILIES[name].tokenizer() for name in NAMES}


def fit(prompter, target=TARGET, documents=DOCUMENTS, question="头痛怎么办?"):
    [fitted] = prompter.fit([(question, Shown(documents, 0, target))])
    return fitted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", [MEDICAL, BERKELEY], ids=["medical", "berkeley"])
def test_the_answer_and_its_end_of_turn_carry_loss_and_nothing_else(name, format, tokenizers):
    tokenizer = tokenizers[name]
    prompter = Prompter(tokenizer, format, max_length=100_000)
    turn = fit(prompter).turn
    trained = tokenizer.decode(turn.tokens[turn.prompt :], clean_up_tokenization_spaces=False)
    assert trained == TARGET + FAMILIES[name].end
    assert turn.tokens[-1] == prompter.end_of_turn
    prompt = tokenizer.decode(turn.tokens[: turn.prompt], clean_up_tokenization_spaces=False)
    for text in (*DOCUMENTS, "头痛怎么办?", format.system or ""):
        assert text in prompt


@pytest.mark.parametrize("name", ["mistral", "gemma", "deepseek-r1"])
def test_a_template_without_a_system_prompt_gets_it_in_the_users_words(name, tokenizers):
    prompter = Prompter(tokenizers[name], MEDICAL, max_length=100_000)
    text = prompter.prompt_text("头痛怎么办?", ["a"])
    assert text.count(MEDICAL.system) == 1
    assert text.index(MEDICAL.system) < text.index("[文档1]")


def test_the_berkeley_prompt_is_the_references(tokenizers):
    assert BERKELEY.prompt("When?", ["one\n two", "three"]) == (
        "<DOCUMENT>one\n two</DOCUMENT>\n<DOCUMENT>three</DOCUMENT>\nWhen?"
    )


def test_the_medical_prompt_numbers_its_documents_and_names_seven_headings():
    prompt = MEDICAL.prompt("头痛?", ["one\n  two", "three"])
    assert "[文档1]\none\n  two\n\n[文档2]\nthree\n\n问题:头痛?" in prompt
    assert prompt.rstrip().endswith("\n".join(MEDICAL.headings))
    assert len(MEDICAL.headings) == 7
    assert MEDICAL.system == "你是一位专业的医疗顾问助手,擅长结构化推理和医疗建议。"


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_shortened_and_never_the_answer(name, tokenizers):
    tokenizer = tokenizers[name]
    whole = fit(Prompter(tokenizer, BERKELEY, max_length=100_000))
    assert not whole.is_shortened
    size = len(whole.turn.tokens)
    exact = fit(Prompter(tokenizer, BERKELEY, max_length=size))
    assert exact == whole
    for length in (size - 1, size - 15, size - 40):
        fitted = fit(Prompter(tokenizer, BERKELEY, max_length=length))
        turn = fitted.turn
        assert fitted.is_shortened
        assert length - 30 <= len(turn.tokens) <= length
        assert not turn.is_cut
        trained = tokenizer.decode(turn.tokens[turn.prompt :], clean_up_tokenization_spaces=False)
        assert trained == TARGET + FAMILIES[name].end
        # The longest one pays.
        assert fitted.documents[0] == DOCUMENTS[0]
        assert DOCUMENTS[1].startswith(fitted.documents[1])
        assert len(fitted.documents[1]) < len(DOCUMENTS[1].strip())


def test_a_row_that_cannot_fit_is_none_and_no_label_is_lost_in_silence(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    empty = Prompter(tokenizer, BERKELEY, max_length=100_000)
    least = len(fit(empty, documents=()).turn.tokens)
    outcomes = []
    for length in range(least - 2, least + 120, 4):
        fitted = fit(Prompter(tokenizer, BERKELEY, max_length=length))
        outcomes.append(fitted is not None)
        if fitted is not None:
            assert len(fitted.turn.tokens) <= length
            assert tokenizer.decode(fitted.turn.tokens).rstrip().endswith("<|im_end|>")
            assert all(fitted.documents)
    assert outcomes == sorted(outcomes), "once it fits, it fits into more"
    assert {True, False} == set(outcomes)


def test_what_the_target_quotes_stays_in_its_document(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    evidence = "The harbour closes at midnight."
    oracle = "Nothing of note happens. " * 30 + evidence + " Ships wait." * 30
    target = f"So: ##begin_quote##{evidence}##end_quote##\n<ANSWER>: midnight"
    documents = (oracle, "Rain. " * 100)
    for length in (900, 400, 250):
        fitted = fit(Prompter(tokenizer, BERKELEY, max_length=length), target, documents)
        assert fitted.is_shortened
        assert len(fitted.turn.tokens) <= length
        assert evidence in fitted.documents[0]
        assert fitted.documents[0] in oracle


def test_rows_are_encoded_alike_alone_and_together(tokenizers):
    prompter = Prompter(tokenizers["llama3"], MEDICAL, max_length=900)
    rows = [(f"问题{i}", Shown(DOCUMENTS[: i % 4], 0, TARGET * (1 + i % 3))) for i in range(150)]
    together = list(prompter.fit(rows))
    assert together == [next(prompter.fit([row])) for row in rows]
    assert any(f is not None and f.is_shortened for f in together)


def test_a_prompt_for_generation_is_shortened_to_its_limit(tokenizers):
    tokenizer = tokenizers["qwen2.5"]
    prompter = Prompter(tokenizer, MEDICAL, max_length=100_000)
    long = ("Ice is cold. " * 200, "Tea is hot.")
    documents = prompter.fit_prompt("Why?", long, limit=700)
    assert documents is not None
    prompt = prompter.prompt_text("Why?", documents)
    assert 640 <= len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) <= 700
    assert documents[1] == long[1]
    assert prompter.fit_prompt("Why?", long, limit=100) is None
    assert prompter.fit_prompt("Why?", ("short",), limit=700) == ("short",)


def test_a_format_of_ones_own_is_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (
        "user: '{{ question }}: {{ documents | join(\" / \") }}'\n"
        "quote: {begin: '<q>', end: '</q>'}\n"
        "admits: [nothing found]\n"
        "teacher: {questions: '{{ oracle }}', answer: '{{ oracle }}', absent: '{{ question }}'}\n"
    )
    path.write_text(text)
    format = load_format(str(path))
    assert format.prompt("Why?", ["a", "b"]) == "Why?: a / b"
    assert format.quotes_of("x <q>a b</q> y <q>c") == ["a b", ""]
    path.write_text(text.replace("{{ question }}:", "{{ questoin }}:").replace("admits", "admit"))
    with pytest.raises(ConfigError) as caught:
        load_format(str(path))
    assert "unknown key; did you mean 'admits'?" in str(caught.value)
    path.write_text(text.replace("{{ question }}:", "{{ questoin }}:"))
    with pytest.raises(ConfigError) as caught:
        load_format(str(path))
    assert "user: 'questoin' is undefined" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_format("medicl")
    assert "did you mean medical?" in str(caught.value)
