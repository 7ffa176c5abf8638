"""Plain documents and their chunks."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import docx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.data.chunks import chunks_of
from baton.data.documents import Document, read_document, read_documents
from baton.errors import DataError

REAL = Path(__file__).parents[3].parent / "shared" / "data" / "raft_torchhub_train.jsonl"


def write_pdf(path: Path, pages: list[list[str]]) -> None:
    """The least of a PDF: Helvetica, a text line a `Tj`, compressed content."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects.append(font)
    kids = []
    for lines in pages:
        shown = " T* ".join(f"({line}) Tj" for line in lines)
        stream = zlib.compress(f"BT /F1 12 Tf 14 TL 72 720 Td {shown} ET".encode())
        objects.append(
            b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(stream), stream)
        )
        content = len(objects)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % content
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    data += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1,
        start,
    )
    path.write_bytes(data)


def test_every_kind_of_document_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("窗外有风。\r\n\r\n很大。".encode("gb18030") * 20)
    (tmp_path / "b.md").write_text("\ufeff# Title\n\nText.\n", encoding="utf-8")
    write_pdf(tmp_path / "c.pdf", [["The first page.", "Second line."], ["The second page."]])
    written = docx.Document()
    written.add_paragraph("Before.")
    table = written.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    written.add_paragraph("After.")
    written.save(str(tmp_path / "d.docx"))
    rows = [{"text": "one"}, {"text": {"api": "two"}}, {"text": " "}]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    found = {document.name: document.text for document in read_documents([tmp_path])}
    assert list(found) == ["a.txt", "b.md", "c.pdf", "d.docx", "e.jsonl:1", "e.jsonl:2"]
    assert found["a.txt"].startswith("窗外有风。\n\n很大。")
    assert found["b.md"] == "# Title\n\nText."
    assert found["c.pdf"].split() == [
        "The",
        "first",
        "page.",
        "Second",
        "line.",
        "The",
        "second",
        "page.",
    ]
    assert found["d.docx"] == "Before.\n\nleft | right\n\nAfter."
    assert (found["e.jsonl:1"], found["e.jsonl:2"]) == ("one", '{"api": "two"}')


def raised(path: Path, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents([path], **options))
    return str(caught.value).replace(f"{path}", "PATH")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert raised(tmp_path / "empty") == "PATH: there is no document in this folder"
    image = tmp_path / "x.png"
    image.write_bytes(b"")
    assert raised(image).startswith("PATH: documents are .docx, .markdown, .md, .pdf, .txt;")
    (blank := tmp_path / "blank.txt").write_text(" \n")
    assert raised(blank) == "PATH: holds no text"
    write_pdf(scan := tmp_path / "scan.pdf", [[]])
    assert raised(scan) == (
        "PATH: holds no text; if its pages are pictures, run them through OCR first"
    )
    (broken := tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing else")
    assert raised(broken).startswith("PATH: damaged PDF (")
    (nodocx := tmp_path / "no.docx").write_bytes(b"PK and nothing else")
    assert raised(nodocx).startswith("PATH: damaged docx (")
    (rows := tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    assert raised(rows) == (
        "PATH:2: no field 'text'; there is body. Name the one that holds the document with --field"
    )
    (lines := tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{oops\n')
    assert raised(lines).startswith("PATH:2: not JSON: ")
    assert "no such file" in raised(tmp_path / "nowhere.md")


def test_one_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    assert read_document(tmp_path / "a.md") == Document("a.md", "x")


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
def test_rows_of_real_api_documents_are_read() -> None:
    documents = list(read_documents([REAL], field="api_data"))
    assert len(documents) == 837
    rows = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    assert [json.loads(document.text) for document in documents] == [r["api_data"] for r in rows]


# --- chunks -----------------------------------------------------------------------------------


def test_a_chunk_ends_where_a_paragraph_does_if_it_can() -> None:
    text = "One two three.\n\nFour five six. Seven eight.\n\nNine ten."
    assert chunks_of(text, max_chars=50) == [
        "One two three.\n\nFour five six. Seven eight.",
        "Nine ten.",
    ]
    assert chunks_of(text, max_chars=30) == [
        "One two three.",
        "Four five six. Seven eight.",
        "Nine ten.",
    ]


def test_a_long_paragraph_ends_with_a_sentence_a_clause_or_a_word() -> None:
    assert chunks_of("今天下雨。明天天晴。", max_chars=7) == ["今天下雨。", "明天天晴。"]
    assert chunks_of("One two, three four", max_chars=12) == ["One two,", "three four"]
    assert chunks_of("aaaa bbbb cccc", max_chars=9) == ["aaaa", "bbbb cccc"]
    assert chunks_of("x" * 25, max_chars=10) == ["x" * 10, "x" * 10, "x" * 5]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab \n.。,，!"), max_size=200), st.integers(1, 40))
def test_chunks_are_verbatim_in_order_and_lose_only_white_space(text: str, size: int) -> None:
    chunks = chunks_of(text, max_chars=size)
    assert all(chunk == chunk.strip() and 0 < len(chunk) <= size for chunk in chunks)
    place = 0
    for chunk in chunks:
        place = text.index(chunk, place) + len(chunk)
    assert "".join("".join(chunks).split()) == "".join(text.split())
