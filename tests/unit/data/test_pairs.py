"""Pairs as tokens: cut by tokens, ended by the tokenizer's own eos, written once, gone on with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from baton.data.pairs import HeldOut, PairCounts, PairEncoder, write_pairs
from baton.data.rows import Row
from baton.data.tokenise import TokenFile, TokenWriter
from baton.data.vocabulary import train_vocabulary
from baton.errors import DamagedError, DataError


def words(**special: str) -> PreTrainedTokenizerFast:
    """One token a word; ids as in the list, so eos is 3 and pad is 5."""
    listed = ["a", "b", "c", "[END]", "d", "[PAD]", "?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "[END]", "pad_token": "[PAD]", "unk_token": "?"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def rows(count: int) -> list[Row]:
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choice("abcd") for _ in range(rng.randint(1, 9)))

    return [Row(n, None, {"prompt": text(), "response": text()}) for n in range(1, count + 1)]


def test_a_text_is_cut_at_so_many_tokens_of_which_the_last_is_eos() -> None:
    encoder = PairEncoder(words(), max_seq_len=4)
    assert encoder.encode(["a b c", "a b c d d", ""]) == [[0, 1, 2, 3], [0, 1, 2, 3], [3]]


def test_cutting_counts_tokens_and_not_characters() -> None:
    text = "北京" * 40
    tokenizer = train_vocabulary([text], vocab=260)  # bytes alone: three tokens a character
    [ids] = PairEncoder(tokenizer, max_seq_len=13).encode([text])
    assert len(ids) == 13
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "北京北京"


def test_a_text_that_spells_a_special_token_is_plain_text() -> None:
    tokenizer = train_vocabulary(["abc"], vocab=260)
    [ids] = PairEncoder(tokenizer, max_seq_len=50).encode(["a</s>b<pad>"])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids[:-1]) == "a</s>b<pad>"


@pytest.mark.parametrize("missing", ["eos", "pad"])
def test_a_tokenizer_without_a_special_token_is_refused(missing: str) -> None:
    tokenizer = words()
    setattr(tokenizer, f"{missing}_token", None)
    with pytest.raises(DataError) as caught:
        PairEncoder(tokenizer, max_seq_len=4)
    assert str(caught.value).startswith(f"the tokenizer names no {missing} token; set {missing}_")


def test_a_written_pair_is_read_back_with_its_prompt(tmp_path: Path) -> None:
    encoder, counts = PairEncoder(words(), max_seq_len=6), PairCounts()
    source = rows(5000)
    writer = TokenWriter(tmp_path, "train", vocab_size=7)
    assert write_pairs(encoder, source, writer, counts)
    file = TokenFile(tmp_path, "train")
    assert len(file) == counts.samples == 5000
    for number in (0, 1, 2047, 2048, 4999):
        tokens, prompt = file.sample(number)
        values = source[number].values
        assert tokens[:prompt].tolist() == encoder.encode([values["prompt"]])[0]
        assert tokens[prompt:].tolist() == encoder.encode([values["response"]])[0]
    everything = np.arange(5000)
    assert counts.tokens == file.lengths(everything).sum()
    assert counts.labelled_tokens == file.labelled(everything).sum()
    assert counts.prompts_cut == sum(len(r.values["prompt"].split()) > 5 for r in source) > 0


def test_writing_goes_on_after_a_kill_from_what_was_brought_to_disk(tmp_path: Path) -> None:
    encoder, source = PairEncoder(words(), max_seq_len=6), rows(9000)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_pairs(encoder, source, TokenWriter(whole, "train", vocab_size=7), PairCounts())
    counts, kept = PairCounts(), {}
    writer = TokenWriter(cut, "train", vocab_size=7)

    def goes_on(counts: PairCounts) -> bool:
        if counts.samples == 4096:
            writer.sync()
            kept.update(vars(counts))
        return counts.samples < 6000

    assert not write_pairs(encoder, source, writer, counts, goes_on=goes_on)
    writer.close()
    again = PairCounts(**kept)
    writer = TokenWriter(cut, "train", vocab_size=7, samples=again.samples, tokens=again.tokens)
    assert write_pairs(encoder, source[again.samples :], writer, again)
    assert again.samples == 9000
    for name in ("train.tokens", "train.index", "train.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_files_with_less_than_was_noted_are_refused(tmp_path: Path) -> None:
    TokenWriter(tmp_path, "train", vocab_size=7).close()
    with pytest.raises(DamagedError) as caught:
        TokenWriter(tmp_path, "train", vocab_size=7, samples=3, tokens=10)
    assert str(caught.value).endswith("0 bytes, expected at least 20")


def test_what_was_read_ahead_or_given_back_reads_the_same(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, "train", vocab_size=7)
    write_pairs(PairEncoder(words(), max_seq_len=6), rows(3000), writer, PairCounts())
    file = TokenFile(tmp_path, "train")
    before = [file.sample(number)[0].tolist() for number in range(0, 3000, 7)]
    file.will_need(np.array([0, 17, 2999]))
    file.will_need(np.array([], dtype=np.int64))
    file.release()
    assert [file.sample(number)[0].tolist() for number in range(0, 3000, 7)] == before


def test_held_out_prompts_are_a_share_that_follows_from_the_seed() -> None:
    prompts = [f"question {n}" for n in range(20_000)]
    chosen = [HeldOut(0.05, 42)(prompt) for prompt in prompts]
    assert sum(chosen) == pytest.approx(1000, rel=0.1)
    assert chosen == [HeldOut(0.05, 42)(f" {prompt}\n") for prompt in prompts]
    assert chosen != [HeldOut(0.05, 43)(prompt) for prompt in prompts]
    assert not any(HeldOut(0.0, 42)(prompt) for prompt in prompts)


# --- the tokenizer ------------------------------------------------------------------------------


def test_any_text_comes_back_unchanged() -> None:
    tokenizer = train_vocabulary(["你好，世界", "hello world"], vocab=264)
    for text in ("你好", "  two  spaces\n", "žluťoučký 🐎"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(tokenizer) == 264
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert len({*special, tokenizer.bos_token_id}) == 4


def test_the_same_text_trains_the_same_tokenizer(tmp_path: Path) -> None:
    texts = [row.values["prompt"] for row in rows(300)] + ["深度学习改变了自然语言处理"] * 5
    for name in ("one", "two"):
        train_vocabulary(texts, vocab=280).save_pretrained(tmp_path / name)
    one, two = (tmp_path / name / "tokenizer.json" for name in ("one", "two"))
    assert json.loads(one.read_text()) == json.loads(two.read_text())


def test_too_little_text_for_so_many_tokens_says_how_many_there_are() -> None:
    with pytest.raises(DataError) as caught:
        train_vocabulary(["abc"], vocab=29_298)
    assert str(caught.value) == (
        "a tokenizer of 29,298 tokens was asked for, but this text yields 262; train it on more"
        " rows, or ask for 262"
    )
