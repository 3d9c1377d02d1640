"""Text files as they come: compressed or not, and in whatever encoding they were saved."""

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePath
from typing import BinaryIO, Final, TextIO, cast

import pyarrow as pa

from data_contracts.errors import DataError, Problem
from tasks.data.ingestion.raw_rows import decodes

AUTO: Final = "auto"
PACKED: Final = {".gz": "gzip", ".zst": "zstd"}

_BYTES: Final = 256 * 1024
_BLOCK_BYTES: Final = 1 << 20
_GUESS_BYTES: Final = 64 * 1024
_SIGNS: Final = ("\n", '"', ",")
_RECORD_END: Final = re.compile(rb'\n|"\s*\}')  # of a line, or of an object where many stand in one line
_FOREIGN_BYTES: Final = 4 << 20
_FOREIGN_RECORDS: Final = 200  # records beyond ASCII that settle what encoding a file has
_WRONG_RECORDS: Final = 20  # fewer records that are not UTF-8 are damage, unless they are half the file
_MARKS: Final = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def data_suffix(path: PurePath) -> str:
    """The suffix that names the format: `.csv` of `rows.csv.gz`."""
    name = PurePath(path.stem) if path.suffix.lower() in PACKED else path
    return name.suffix.lower()


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. Raises DataError if the packed stream is damaged or ends too early."""
    method = PACKED.get(path.suffix.lower())
    if method is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        with pa.input_stream(str(path), compression=method) as stream:
            yield cast(BinaryIO, stream)
    except (pa.ArrowInvalid, OSError) as error:
        act = "copy the file again, and check it with `gzip -t` or `zstd -t`"
        raise DataError(Problem(f"the packed file is damaged or cut: {error}", str(path), act=act)) from error


@contextmanager
def open_text(path: Path, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """The file's text; a byte that is not in the encoding becomes a lone surrogate, so that nothing is lost.

    UTF-16 and UTF-32 have no byte that could be kept so: DataError, as for a packed file that is damaged.
    """
    try:
        with open_bytes(path) as file:
            yield io.TextIOWrapper(file, codec(encoding), "surrogateescape", newline)
    except UnicodeError as error:
        act = "save it as UTF-8, or name its encoding with --set data.encoding=NAME"
        raise DataError(Problem(f"not {encoding} to its end: {str(error)[:120]}", str(path), act=act)) from error


def codec(encoding: str) -> str:
    """UTF-8 tolerates a byte order mark."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def read_sample(path: Path) -> bytes:
    """The first 256 KiB, in whole lines: no character is cut in two."""
    with open_bytes(path) as file:
        return _whole_lines(file.read(_BYTES), _BYTES - 1)


def _whole_lines(text: bytes, size: int) -> bytes:
    """The lines that end within `size`, or as much of the first."""
    return text if len(text) <= size else text[: text.rfind(b"\n", 0, size) + 1] or text[:size]


def resolve_encoding(path: Path, configured: str) -> tuple[str, str]:
    """The encoding of a file, and why. `auto`: a byte order mark, else what its bytes say, read on until they do.

    A file of which nothing fits is taken for UTF-8, so that its lines are rejected one by one.
    """
    if configured != AUTO:
        return configured, "as configured"
    state = path.stat()
    return _find_encoding(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _find_encoding(path: Path, size: int, modified: int) -> tuple[str, str]:
    """Found once for each state of a file: an ASCII file is read to its end."""
    sample = read_sample(path)
    for mark, name in _MARKS:
        if sample.startswith(mark):
            return name, "its byte order mark says so"
    if wide := _wide(sample):
        return wide, "every ASCII character comes with a zero"
    foreign = _foreign_records(path)
    wrong = [record for record in foreign if not _reads(record, "utf-8")]
    few = len(wrong) < _WRONG_RECORDS and len(wrong) <= len(_RECORD_END.findall(sample)) / 2
    if few or len(wrong) <= len(foreign) / 2:
        return "utf-8", "most of its records are"
    guess = guess_encoding(b"\n".join(wrong))
    if guess and "{".encode(guess) != b"{":  # a mark in the middle of the file
        guess = None
    reason = "most records that are not ASCII are not utf-8; a guess, look at some rows"
    return (guess, reason) if guess else ("utf-8", "nothing fits")


def _wide(sample: bytes) -> str | None:
    """UTF-16 without a mark, detected by quotes, commas and line ends that come with a zero; None if it is something else."""
    signs = sum(sample.count(sign.encode()) for sign in _SIGNS)
    for name in ("utf-16-le", "utf-16-be") if b"\0" in sample else ():
        text = sample.decode(name, "replace")
        if sum(map(text.count, _SIGNS)) > signs / 2:
            return name
    return None


def _foreign_records(path: Path) -> list[bytes]:
    """The first records that are not ASCII, wherever they stand in the file, without their ASCII texts."""
    foreign: list[bytes] = []
    rest, size = b"", 0
    with open_bytes(path) as file:
        while size < _FOREIGN_BYTES and len(foreign) < _FOREIGN_RECORDS and (block := file.read(_BLOCK_BYTES)):
            block = rest + block
            # In no encoding that holds ASCII is a sign a part of another character.
            end = max(block.rfind(sign.encode()) for sign in _SIGNS) + 1 or len(block)
            block, rest = block[:end], block[end:]
            if not block.isascii():
                foreign += [_foreign(record) for record in _RECORD_END.split(block) if not record.isascii()]
                size += len(block)
    return foreign if rest.isascii() else [*foreign, _foreign(rest)]


def _foreign(record: bytes) -> bytes:
    return b" ".join(text for text in record.split(b'"') if not text.isascii())


def mostly_undecodable(sample: bytes, encoding: str) -> bool:
    """Whether more than half of the records are not in the encoding."""
    wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf16", "utf-32", "utf32"))
    if not wide and sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    decoder = codecs.getincrementaldecoder(codec(encoding))("surrogateescape")
    try:
        text = decoder.decode(sample)  # its end may be cut
    except UnicodeError:
        return True  # UTF-16 and UTF-32 have no byte that could be escaped, and may miss their mark
    records = [record for record in re.split(_RECORD_END.pattern.decode(), text) if record.strip(" \r,]")]
    return sum(not decodes(record) for record in records) > len(records) / 2


def guess_encoding(sample: bytes) -> str | None:
    """The encoding that charset_normalizer finds likeliest, if the whole sample can be read in it."""
    from charset_normalizer import from_bytes

    matches = from_bytes(_whole_lines(sample, _GUESS_BYTES))
    best = matches.best()
    if best is None:
        return None
    name = best.encoding
    equals = [match for match in matches if match.chaos <= best.chaos and match.coherence >= best.coherence]
    if any("cp1252" in match.could_be_from_charset for match in equals):
        name = "cp1252"  # of equals the library takes the first by name, which is Central European
    # gb18030 reads everything its two subsets read.
    if name in ("gb2312", "gbk", "hz", "big5hkscs") and _reads(sample, "gb18030"):
        name = "gb18030"
    return name if _reads(sample, name) else None


def _reads(sample: bytes, encoding: str) -> bool:
    try:
        sample.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
