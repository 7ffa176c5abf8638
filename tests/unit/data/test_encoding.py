"""Encodings: found, checked, and refused with the byte at fault."""

from __future__ import annotations

import codecs
import gzip
from pathlib import Path

import pytest

from baton.data.encoding import CHUNK_BYTES, detect, find_bad_byte, resolve
from baton.errors import DataError

CHINESE = "问题,回答\r\n高血压患者能吃党参吗？,高血压病人可以口服党参的，请放心。\r\n"
FILE = Path("rows.csv")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def message(data: bytes, declared: str | None = None) -> str:
    FILE.write_bytes(data)
    with pytest.raises(DataError) as caught:
        resolve(FILE, declared)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"plain,ascii\n", "utf-8"),
        (CHINESE.encode(), "utf-8"),
        (CHINESE.encode("utf-8-sig"), "utf-8"),
        (codecs.BOM_UTF16_LE + CHINESE.encode("utf-16-le"), "utf-16-le"),
        (codecs.BOM_UTF16_BE + CHINESE.encode("utf-16-be"), "utf-16-be"),
        (codecs.BOM_UTF32_LE + CHINESE.encode("utf-32-le"), "utf-32-le"),
        (CHINESE.encode("utf-16-le"), "utf-16-le"),
        (CHINESE.encode("utf-16-be"), "utf-16-be"),
        ("question,answer\n".encode("utf-16-le"), "utf-16-le"),
        (CHINESE.encode("gbk"), "gb18030"),
        (CHINESE.encode("gb18030"), "gb18030"),
        ("q,a\n头疼,多喝水\n".encode("gbk"), "gb18030"),
        (("q,a\n" + "plain,row\n" * 200_000 + CHINESE).encode("gbk"), "gb18030"),
        ((CHINESE * 20).replace("问题", "問題").encode("big5", "ignore"), "big5"),
        ("今日は天気がいいですね、散歩に行きましょう\n".encode("shift_jis") * 20, "cp932"),
        (b"question,answer\nwith a \0 in,it\n" * 3, "utf-8"),
    ],
)
def test_the_encoding_of_a_file_is_found(data: bytes, expected: str) -> None:
    FILE.write_bytes(data)
    assert detect(FILE) == expected


def test_the_encoding_of_a_gzipped_file_is_found() -> None:
    path = Path("rows.csv.gz")
    path.write_bytes(gzip.compress(CHINESE.encode("gbk")))
    assert detect(path) == "gb18030"


@pytest.mark.parametrize("declared", ["gbk", "GB2312", "cp936", "gb18030"])
def test_every_national_chinese_encoding_is_read_as_gb18030(declared: str) -> None:
    FILE.write_bytes(CHINESE.encode("gbk"))
    assert resolve(FILE, declared) == "gb18030"


@pytest.mark.parametrize(
    ("declared", "data", "expected"),
    [
        ("utf-16", "q,a\n".encode("utf-16-be"), "utf-16-le"),
        ("utf-16", codecs.BOM_UTF16_BE + "q,a\n".encode("utf-16-be"), "utf-16-be"),
        ("UTF8", b"q,a\n", "utf-8"),
        ("utf-8-sig", b"q,a\n", "utf-8"),
        ("ascii", b"q,a\n", "utf-8"),
        ("latin-1", b"q,a\n", "iso8859-1"),
    ],
)
def test_a_declared_encoding_is_made_definite(declared: str, data: bytes, expected: str) -> None:
    FILE.write_bytes(data)
    assert resolve(FILE, declared) == expected


def test_a_character_split_between_two_chunks_is_whole() -> None:
    FILE.write_bytes(b"x" * (CHUNK_BYTES - 1) + "药".encode() + b"\n\xff")
    bad = find_bad_byte(FILE, "utf-8")
    assert bad is not None
    assert (bad.offset, bad.line, bad.byte) == (CHUNK_BYTES + 3, 2, 0xFF)


@pytest.mark.parametrize(
    ("name", "bad_bytes"),
    [("utf-8", b"\xff"), ("gb18030", b"\xff"), ("utf-16-le", b"\x00\xdc"), ("big5", b"\xff")],
)
def test_the_place_of_a_bad_byte_is_exact(name: str, bad_bytes: bytes) -> None:
    good = ("甲乙丙\n" * 300_000).encode(name)
    FILE.write_bytes(good + bad_bytes + "丁\n".encode(name))
    bad = find_bad_byte(FILE, name)
    assert bad is not None
    assert (bad.offset, bad.line, bad.byte) == (len(good), 300_001, bad_bytes[0])


def test_an_unknown_encoding_is_answered_with_the_nearest() -> None:
    assert message(b"q,a\n", "gb18300") == (
        "rows.csv: there is no text encoding 'gb18300'; did you mean gb18030?"
    )
    assert message(b"q,a\n", "hex") == (
        "rows.csv: there is no text encoding 'hex'; leave it out to have it detected"
    )


def test_utf8_declared_as_something_else_is_refused_before_it_becomes_gibberish() -> None:
    assert message(CHINESE.encode(), "gbk") == (
        "rows.csv: encoding gbk is declared, but the file starts as valid utf-8 with multi-byte "
        "characters; declare encoding: utf-8"
    )


def test_utf8_with_one_foreign_line_in_the_middle_is_not_taken_for_another_encoding() -> None:
    data = CHINESE.encode() * 50 + "混入,一行\n".encode("gbk") + CHINESE.encode() * 50
    assert message(data) == (
        "rows.csv: byte 5,100 (line 101) is 0xbb, which is not valid utf-8; no one encoding "
        "decodes the whole file, so it is damaged or mixes two; repair or remove line 101"
    )


def test_a_bad_first_line_does_not_hide_that_the_rest_is_utf8() -> None:
    assert message("混入\n".encode("gbk") + CHINESE.encode() * 50) == (
        "rows.csv: byte 0 (line 1) is 0xbb, which is not valid utf-8; no one encoding "
        "decodes the whole file, so it is damaged or mixes two; repair or remove line 1"
    )


def test_gb18030_with_a_foreign_line_names_that_line() -> None:
    data = CHINESE.encode("gbk") * 50 + "café\n".encode("latin-1") + CHINESE.encode("gbk") * 50
    assert message(data) == (
        "rows.csv: byte 3,503 (line 101) is 0xe9, which is not valid gb18030; no one encoding "
        "decodes the whole file, so it is damaged or mixes two; repair or remove line 101"
    )


def test_a_file_cut_off_inside_a_character_says_so() -> None:
    assert message(CHINESE.encode() + "药".encode()[:2]) == (
        "rows.csv: byte 102 (line 3) is 0xe8, the start of a utf-8 character that the file ends "
        "in; the file is cut off; fetch it again, or remove its last line"
    )
    assert message((CHINESE + "药").encode("gbk")[:-1]) == (
        "rows.csv: byte 70 (line 3) is 0xd2, the start of a gb18030 character that the file ends "
        "in; the file is cut off; fetch it again, or remove its last line"
    )


def test_a_damaged_file_with_a_byte_order_mark_is_refused() -> None:
    assert message(codecs.BOM_UTF16_LE + "q,a\n".encode("utf-16-le") + b"\0") == (
        "rows.csv: byte 10 (line 2) is 0x00, the start of a utf-16-le character that the file "
        "ends in; the file is cut off; fetch it again, or remove its last line"
    )


def test_single_byte_encodings_are_not_guessed() -> None:
    text = "le café est très bon, où êtes-vous? Ça va à l'été\n" * 20
    assert message(text.encode("cp1252")) == (
        "rows.csv: byte 6 (line 1) is 0xe9, which is not valid utf-8, and single-byte encodings "
        "cannot be told apart reliably; declare encoding: (likely one of cp1250, cp1252, cp1257, "
        "iso8859_10)"
    )


def test_an_empty_file_is_refused() -> None:
    assert message(b"") == "rows.csv: is empty (0 bytes); fetch or write it again"


def test_a_missing_file_is_answered_with_the_nearest_name() -> None:
    Path("medical_qa.csv").write_bytes(b"q,a\n")
    with pytest.raises(DataError) as caught:
        resolve(Path("medical-qa.csv"), None)
    assert str(caught.value) == (
        "medical-qa.csv: there is no such file; did you mean medical_qa.csv?"
    )
    with pytest.raises(DataError) as caught:
        resolve(Path("nowhere/x.csv"), "utf-8")
    assert str(caught.value) == (
        "nowhere/x.csv: there is no such file; check the path in the experiment"
    )


def test_a_folder_is_not_a_file() -> None:
    Path("folder").mkdir()
    with pytest.raises(DataError) as caught:
        resolve(Path("folder"), None)
    assert str(caught.value) == "folder: is a folder; name one file in it"


def test_a_damaged_gzip_file_is_refused() -> None:
    path = Path("rows.csv.gz")
    path.write_bytes(gzip.compress(CHINESE.encode() * 100)[:-12])
    with pytest.raises(DataError) as caught:
        detect(path)
    assert str(caught.value) == (
        "rows.csv.gz: damaged gzip file (Compressed file ended before the end-of-stream marker "
        "was reached); fetch it again"
    )
