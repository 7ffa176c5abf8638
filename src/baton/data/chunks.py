"""Documents cut into chunks at the best place near a given size, every chunk verbatim."""

from __future__ import annotations

import re
from collections.abc import Iterable

from baton.data.documents import Document

# From the best place to break a text to the worst.
_BREAKS = tuple(
    re.compile(pattern)
    for pattern in (r"\n\s*\n", r"\n", r"[.!?]\s|[。！？；]", r"[,;:]\s|[，、：]", r"\s")
)


def chunks_of(text: str, *, max_chars: int) -> list[str]:
    """Cut `text` into pieces of at most `max_chars` characters, white space at their ends removed.

    A piece ends after a paragraph if one ends in the second half of the room there is, else
    after a line, a sentence, a clause, a word; only a longer run of letters is cut anywhere.
    Quotes from a chunk can be looked up in the document: nothing is rewritten.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, got {max_chars}")
    chunks, start = [], 0
    while start < len(text):
        end = len(text) if len(text) - start <= max_chars else _break(text, start, max_chars)
        piece = text[start:end].strip()
        if piece:
            chunks.append(piece)
        start = end
    return chunks


def _break(text: str, start: int, room: int) -> int:
    half, end = start + room // 2, start + room
    for pattern in _BREAKS:
        places = [match.end() for match in pattern.finditer(text, half, end)]
        if places:
            return places[-1]
    return end


def distinct_chunks(documents: Iterable[Document], *, max_chars: int) -> list[str]:
    """Every different chunk of the documents, in their order."""
    chunks: dict[str, str] = {}
    for document in documents:
        for chunk in chunks_of(document.text, max_chars=max_chars):
            chunks.setdefault(same(chunk), chunk)
    return list(chunks.values())


def same(text: str) -> str:
    """What two texts have in common that differ in white space alone."""
    return " ".join(text.split())
