"""Which encoding a text file is in, and where exactly it breaks when it is not.

Detection asks in this order: a byte order mark; UTF-8 (strict, the whole file); UTF-16 by its
zero bytes; then charset-normalizer on a sample, believed only if its answer decodes the whole
file strictly. Two things are refused rather than guessed: UTF-8 with damaged or foreign bytes in
it, and single-byte encodings (cp1250 and cp1252 both decode nearly anything; picking the wrong
one turns "très" into "trčs" without an error).
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import encodings.aliases
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from baton.errors import DataError

CHUNK_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 16
# UTF-8 is recognised by its continuation bytes. GBK text passes as UTF-8 for about one character
# in five, so 16 continuation bytes in a row without an error do not happen by chance.
ENOUGH_CONTINUATION_BYTES = 16
# Below this, charset-normalizer takes short Chinese text for Korean as often as not.
SHORT_SAMPLE_BYTES = 64

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16 LE, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# GB18030 reads every GBK and GB2312 file, and the rare characters that exporters slip into them.
_SUPERSETS = {"gbk": "gb18030", "gb2312": "gb18030", "ascii": "utf-8", "utf-8-sig": "utf-8"}
# Strict enough that decoding a whole file with them proves something.
_MULTIBYTE = frozenset(
    {"gb18030", "big5", "big5hkscs", "cp950", "cp932", "shift_jis", "euc_jp", "cp949", "euc_kr"}
    | {"utf_16_le", "utf_16_be"}
)


@dataclass(frozen=True, slots=True)
class BadByte:
    """The first byte that an encoding cannot decode."""

    encoding: str
    offset: int
    line: int
    byte: int
    cut_off: bool
    """The file ends in the middle of this character."""
    continuation_bytes: int
    """Bytes before it beyond one a character: evidence that the encoding was right so far."""

    def __str__(self) -> str:
        where = f"byte {self.offset:,} (line {self.line:,}) is 0x{self.byte:02x}"
        if self.cut_off:
            return f"{where}, the start of a {self.encoding} character that the file ends in"
        return f"{where}, which is not valid {self.encoding}"


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacking `.gz`. Raises DataError if it is missing or damaged."""
    try:
        stream: IO[bytes] = path.open("rb")
    except FileNotFoundError:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else "check the path in the experiment"
        raise DataError(f"{path}: there is no such file; {hint}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name one file in it") from None
    with stream:
        if path.suffix.lower() != ".gz":
            yield stream
            return
        try:
            with gzip.open(stream) as unpacked:
                yield cast("IO[bytes]", unpacked)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error


@contextlib.contextmanager
def open_text(path: Path, encoding: str, *, newline: str) -> Iterator[IO[str]]:
    """Open a file as text, strictly: a byte that does not decode ends in DataError, with advice.

    The error arrives where the reader meets it, after the rows before it.
    """
    with open_bytes(path) as stream:
        text = io.TextIOWrapper(stream, encoding=encoding, errors="strict", newline=newline)
        try:
            yield text
        except UnicodeDecodeError:
            raise _undecodable(path, encoding) from None


def resolve(path: Path, declared: str | None) -> str:
    """The encoding to read `path` with: the declared one, checked, or the detected one.

    GBK and GB2312 are widened to GB18030, `utf-16` is settled by the byte order mark.
    """
    if declared is None:
        return detect(path)
    try:
        # The only public door that refuses `hex`, `rot13` and the like even without any bytes.
        io.TextIOWrapper(io.BytesIO(), encoding=declared)
        name = codecs.lookup(declared).name
    except LookupError:
        near = difflib.get_close_matches(declared.lower(), _known_names(), n=1)
        known = near and near[0] != declared.lower()  # `hex` is near itself, and no text encoding
        hint = f"did you mean {near[0]}?" if known else "leave it out to have it detected"
        raise DataError(f"{path}: there is no text encoding {declared!r}; {hint}") from None
    name = _SUPERSETS.get(name, name)
    head = _head(path)
    if name in ("utf-16", "utf-32"):
        marked = [found for bom, found in _BOMS if head.startswith(bom) and found.startswith(name)]
        return marked[0] if marked else f"{name}-le"
    if not name.startswith("utf-") and _looks_like_utf8(head):
        raise DataError(
            f"{path}: encoding {declared} is declared, but the file starts as valid utf-8 with "
            "multi-byte characters; declare encoding: utf-8"
        )
    return name


def detect(path: Path) -> str:
    """Find the encoding of a text file; reads it once (UTF-8) or twice. Never a silent guess.

    Raises DataError, with the first bad byte and what to do, if no encoding fits the whole file.
    """
    head = _head(path)
    for bom, name in _BOMS:
        if head.startswith(bom):
            return _checked(path, name)
    wide = _wide(head)
    if wide is not None:
        return _checked(path, wide)
    bad = find_bad_byte(path, "utf-8")
    if bad is None:
        return "utf-8"
    sample = _sample(path, bad.offset)
    if bad.continuation_bytes >= ENOUGH_CONTINUATION_BYTES or _mostly_utf8(sample):
        raise DataError(f"{path}: {bad}; {_repair(bad)}")
    guesses = _guesses(sample)
    best = guesses[0] if guesses else "gb18030"
    if best not in _MULTIBYTE:
        names = ", ".join(guesses[:4])
        raise DataError(
            f"{path}: {bad}, and single-byte encodings cannot be told apart reliably; "
            f"declare encoding: (likely one of {names})"
        )
    failures = [bad]
    for name in dict.fromkeys((best, "gb18030")):
        failure = find_bad_byte(path, name)
        if failure is None:
            return codecs.lookup(name).name
        failures.append(failure)
    # The one that came furthest says most about the file.
    furthest = max(failures, key=lambda failure: failure.offset)
    raise DataError(f"{path}: {furthest}; {_repair(furthest)}")


def find_bad_byte(path: Path, encoding: str) -> BadByte | None:
    """Decode a whole file strictly, in constant memory; the first byte that fails, or None."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    fed = line = chars = 0
    with open_bytes(path) as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            fed += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # `object` holds bytes kept from earlier chunks too, but always ends where we are.
                offset = fed - len(error.object) + error.start
                text = error.object[: error.start].decode(encoding, errors="replace")
                return BadByte(
                    encoding=encoding,
                    offset=offset,
                    line=line + text.count("\n") + 1,
                    byte=error.object[error.start],
                    cut_off=not chunk,
                    continuation_bytes=offset - chars - len(text),
                )
            line += text.count("\n")
            chars += len(text)
            if not chunk:
                return None


def _undecodable(path: Path, encoding: str) -> DataError:
    bad = find_bad_byte(path, encoding)
    assert bad is not None, "the reader met a byte that this encoding cannot decode"
    try:
        fits = detect(path)
    except DataError:
        return DataError(f"{path}: {bad}; {_repair(bad)}")
    return DataError(f"{path}: {bad}; declare encoding: {fits}; it decodes the whole file")


def _repair(bad: BadByte) -> str:
    if bad.cut_off:
        return "the file is cut off; fetch it again, or remove its last line"
    return (
        "no one encoding decodes the whole file, so it is damaged or mixes two; "
        f"repair or remove line {bad.line:,}"
    )


def _checked(path: Path, encoding: str) -> str:
    bad = find_bad_byte(path, encoding)
    if bad is not None:
        raise DataError(f"{path}: {bad}; {_repair(bad)}")
    return encoding


def _head(path: Path) -> bytes:
    with open_bytes(path) as stream:
        head = stream.read(SAMPLE_BYTES)
    if not head:
        raise DataError(f"{path}: is empty (0 bytes); fetch or write it again")
    return head


def _sample(path: Path, offset: int) -> bytes:
    """Whole lines around `offset`: a sample cut inside a character would be decodable by none."""
    before = min(offset, SAMPLE_BYTES // 2)
    with open_bytes(path) as stream:
        stream.seek(offset - before)
        sample = stream.read(before + SAMPLE_BYTES)
        at_end = not stream.read(1)
    # Up to the last newline before the bad byte there was only valid UTF-8.
    start = sample.rfind(b"\n", 0, before) + 1
    end = len(sample) if at_end else sample.rfind(b"\n") + 1
    return sample[start:end] if end > start else sample


def _wide(head: bytes) -> str | None:
    """UTF-16 without a byte order mark: zero bytes at (nearly) only even or only odd places."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    zeros = even + odd
    if zeros < 4 or min(even, odd) * 20 > zeros:
        return None
    # A zero byte here and there in a UTF-8 file is a damaged row, not UTF-16.
    if zeros * 5 < len(head) and _decodes(head, "utf-8"):
        return None
    return "utf-16-be" if even > odd else "utf-16-le"


def _decodes(head: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)("strict").decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _looks_like_utf8(head: bytes) -> bool:
    if not _decodes(head, "utf-8"):
        return False
    surplus = len(head) - len(head.decode("utf-8", errors="ignore"))
    return surplus >= ENOUGH_CONTINUATION_BYTES


def _mostly_utf8(sample: bytes) -> bool:
    text = sample.decode("utf-8", errors="replace")
    broken = text.count("\ufffd")
    foreign = sum(not char.isascii() for char in text)
    return foreign - broken > 4 * broken


def _guesses(sample: bytes) -> list[str]:
    """What charset-normalizer makes of the sample, most likely first, as Python codec names."""
    import charset_normalizer

    matches = charset_normalizer.from_bytes(sample)
    names = [_SUPERSETS.get(match.encoding, match.encoding) for match in matches]
    short = sum(byte >= 0x80 for byte in sample) < SHORT_SAMPLE_BYTES
    if short and "gb18030" in names:
        names.insert(0, "gb18030")
    return list(dict.fromkeys(names))


def _known_names() -> list[str]:
    names = {*encodings.aliases.aliases, *encodings.aliases.aliases.values()}
    return sorted(names | {name.replace("_", "-") for name in names})
