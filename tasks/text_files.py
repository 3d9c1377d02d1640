"""Text files as bytes, blocks or lines: decompressed, decoded byte for byte, and never silently cut short."""

import codecs
import io
import zlib
from pathlib import Path
from typing import Any, Final

from data_contracts.errors import DataError, Problem

BLOCK: Final = 1024 * 1024
_COMPRESSED_BLOCK: Final = 16 * 1024  # what one read inflates stays small
_MAGIC: Final = {"gzip": b"\x1f\x8b", "zstandard": b"\x28\xb5\x2f\xfd"}
_NAMED: Final = {".gz": "gzip", ".zst": "zstandard"}


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Each byte that cannot be decoded becomes one surrogate; unlike surrogateescape this knows UTF-16 and UTF-32."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("tunegate-escape", _escape)


class _Inflated(io.RawIOBase):
    """The bytes inside a compressed file. All that can be inflated is read before DataError says that more is lost."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind
        self._file = path.open("rb")
        self._inflate: Any = None
        self._ready = memoryview(b"")
        self._started = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._file.read(_COMPRESSED_BLOCK)
            if not block:
                if self._inflate is not None or not self._started:
                    raise self._broken("it ends in the middle of the compressed data")
                return 0
            self._ready = memoryview(self._inflated(block))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _inflated(self, block: bytes) -> bytes:
        """One file may hold several compressed parts, and gzip files may end with zeros."""
        import zstandard

        parts: list[bytes] = []
        try:
            while block:
                if self._inflate is None:
                    if self._started and not (block := block.lstrip(b"\0")):
                        break
                    self._inflate = zlib.decompressobj(31) if self._kind == "gzip" else _zstd()
                    self._started = True
                parts.append(self._inflate.decompress(block))
                block = self._inflate.unused_data if self._inflate.eof else b""
                if self._inflate.eof:
                    self._inflate = None
        except (zlib.error, zstandard.ZstdError) as error:
            if not any(parts):
                raise self._broken(str(error)[:80]) from error
            # First what is whole; the next read finds the damage again, for the decompressor stays broken.
            self._inflate, self._file = _Broken(error), io.BufferedReader(io.BytesIO(b"\1"))  # type: ignore[arg-type]
        return b"".join(parts)

    def _broken(self, why: str) -> DataError:
        act = "fetch or compress the file again; the records before the damage can be read"
        return DataError(Problem(f"damaged {self._kind} data: {why}", str(self._path), act=act))

    def close(self) -> None:
        self._file.close()
        super().close()
