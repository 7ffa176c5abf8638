"""Plain documents: text, Markdown, PDF, docx, and rows of JSON, each as text with a name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.data import encoding as encodings
from baton.data.json_rows import read_objects
from baton.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and where it came from (`guide.pdf`, `api.jsonl:12`)."""

    name: str
    text: str


def read_document(path: Path) -> Document:
    """One file as one document. Raises `DataError` if it cannot be read or holds no text."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise DataError(f"{path}: documents are {known}; save it as one of these")
    text = _clean(reader(path))
    if not text:
        raise DataError(f"{path}: holds no text{_WHY_EMPTY.get(path.suffix.lower(), '')}")
    return Document(path.name, text)


def read_documents(paths: Sequence[Path], *, field: str = "text") -> Iterator[Document]:
    """Every document of files and folders, in the order given; folders sorted by name.

    A JSON array or JSONL file is a document a row: what stands under `field`, as it is if it is
    text, else as JSON.

    Raises:
        DataError: a file is no document, cannot be read, or holds none.
    """
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _is_known(p))
            if not inside:
                raise DataError(f"{path}: there is no document in this folder")
            for file in inside:
                yield from _of_file(file, field)
        else:
            yield from _of_file(path, field)


def _of_file(path: Path, field: str) -> Iterator[Document]:
    if path.suffix.lower() in _ROWS:
        yield from _of_rows(path, field)
    else:
        yield read_document(path)


def _of_rows(path: Path, field: str) -> Iterator[Document]:
    for line, row in read_objects(path):
        if not isinstance(row, dict):
            what = f"not JSON: {row}" if isinstance(row, Exception) else "not a JSON object"
            raise DataError(f"{path}:{line}: {what}")
        if field not in row:
            there = ", ".join(row) or "nothing"
            raise DataError(
                f"{path}:{line}: no field {field!r}; there is {there}. Name the one that holds the"
                " document with --field"
            )
        value = row[field]
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if text.strip():
            yield Document(f"{path.name}:{line}", _clean(text))


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in _READERS or path.suffix.lower() in _ROWS


def _clean(text: str) -> str:
    """One kind of line end, nothing that a tokenizer or JSON could not take."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-8", "replace").decode().strip()


def _read_text(path: Path) -> str:
    with encodings.open_text(path, encodings.resolve(path, None), newline="\n") as stream:
        return stream.read().removeprefix("\ufeff")


def _read_pdf(path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    with encodings.open_bytes(path) as stream:
        try:
            reader = PdfReader(stream)
            if reader.is_encrypted:
                raise DataError(f"{path}: is encrypted; save it without a password")
            return "\n\n".join(page.extract_text() for page in reader.pages)
        # pypdf meets damaged objects as all kinds of errors of Python.
        except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{path}: damaged PDF ({error}); fetch or export it again") from error


def _read_docx(path: Path) -> str:
    from zipfile import BadZipFile

    import docx
    from docx.opc.exceptions import PackageNotFoundError
    from docx.table import Table

    with encodings.open_bytes(path) as stream:
        try:
            document = docx.Document(stream)
        except (PackageNotFoundError, BadZipFile, KeyError, ValueError) as error:
            raise DataError(f"{path}: damaged docx ({error}); save it again") from error
        blocks = []
        for block in document.iter_inner_content():
            if isinstance(block, Table):
                rows = (" | ".join(cell.text for cell in row.cells) for row in block.rows)
                blocks.append("\n".join(rows))
            else:
                blocks.append(block.text)
    return "\n\n".join(block for block in blocks if block.strip())


_READERS: dict[str, Callable[[Path], str]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".markdown": _read_text,
    ".pdf": _read_pdf,
    ".docx": _read_docx,
}
_ROWS = (".json", ".jsonl", ".ndjson")
_WHY_EMPTY = {".pdf": "; if its pages are pictures, run them through OCR first"}
