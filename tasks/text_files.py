"""Text files as they come: compressed or not, and in whatever encoding they were saved."""

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, TextIO, cast

import pyarrow as pa

from data_contracts.errors import DataError, Problem
from tasks.raw_rows import decodes

AUTO: Final = "auto"
PACKED: Final = {".gz": "gzip", ".zst": "zstd"}

_BYTES: Final = 256 * 1024
_GUESS_BYTES: Final = 64 * 1024
_MARKS: Final = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def data_suffix(path: Path) -> str:
    """The suffix that tells the format: `.csv` of `rows.csv.gz`."""
    name = Path(path.stem) if path.suffix.lower() in PACKED else path
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
        sample = file.read(_BYTES)
    return sample[: sample.rfind(b"\n") + 1] or sample if len(sample) == _BYTES else sample


def resolve_encoding(path: Path, configured: str) -> tuple[str, str]:
    """The encoding of a file, and why. `auto`: a byte order mark, else UTF-8 if most lines are, else a guess.

    A file of which nothing fits is taken for UTF-8, so that its lines are rejected one by one.
    """
    if configured != AUTO:
        return configured, "as configured"
    sample = read_sample(path)
    for mark, name in _MARKS:
        if sample.startswith(mark):
            return name, "its byte order mark says so"
    if not mostly_undecodable(sample, "utf-8"):
        return "utf-8", "most of its lines are"
    guess = guess_encoding(sample)
    return (guess, "hardly a line of it is utf-8; a guess, look at some rows") if guess else ("utf-8", "nothing fits")


def mostly_undecodable(sample: bytes, encoding: str) -> bool:
    """Whether more than half of the lines are not in the encoding."""
    wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf16", "utf-32", "utf32"))
    if not wide and sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    try:
        lines = [line for line in sample.decode(codec(encoding), "surrogateescape").split("\n") if line.strip()]
    except UnicodeDecodeError:
        return True  # UTF-16 and UTF-32 have no byte that could be escaped
    return sum(not decodes(line) for line in lines) > len(lines) / 2


def guess_encoding(sample: bytes) -> str | None:
    """The encoding that charset_normalizer finds likeliest, if the whole sample can be read in it."""
    from charset_normalizer import from_bytes

    best = from_bytes(sample[:_GUESS_BYTES]).best()
    if best is None:
        return None
    # gb18030 reads everything its two subsets read.
    if best.encoding in ("gb2312", "gbk", "hz", "big5hkscs") and _reads(sample, "gb18030"):
        return "gb18030"
    return best.encoding if _reads(sample, best.encoding) else None


def _reads(sample: bytes, encoding: str) -> bool:
    try:
        sample.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
