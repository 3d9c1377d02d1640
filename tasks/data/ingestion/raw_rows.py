"""One record as it was found: its place, its text, and what a JSON text means or why it means nothing."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_contracts.rows import Reason, Rejection

_DETAIL_CHARS = 80
_KEY_CHARS = 40


class RawRow(NamedTuple):
    """One record as found. `line` is 1-based, or the record's number where the format has no lines."""

    line: int
    raw: str
    value: Mapping[str, Any] | Rejection


class _DuplicateKey(ValueError):
    """Carries the name of a field out of the decoder."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict, unless that would lose a value."""
    item = dict(pairs)
    if len(item) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return item


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)
# The value that starts at a place of a text, and where it ends.
scan_object = _DECODER.raw_decode


def decodes(text: str) -> bool:
    """False if the text holds a surrogate: a byte that could not be decoded, or half a character in JSON."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Surrogates become `\\udc80`, so that the text can be stored."""
    return text.encode("utf-8", "backslashreplace").decode()


def undecodable(line: int, raw: str, encoding: str) -> RawRow:
    return RawRow(line, printable(raw), Rejection(Reason.UNDECODABLE, f"not {encoding}"))


def json_row(line: int, raw: str, encoding: str) -> RawRow:
    """One JSON text. NaN and Infinity are no JSON; nesting or numbers beyond Python's limits count as unparsable."""
    if not decodes(raw):
        return undecodable(line, raw, encoding)
    try:
        value = _DECODER.decode(raw)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} of it, column {error.colno}" if "\n" in raw else f"column {error.colno}"
        return RawRow(line, raw, Rejection(Reason.UNPARSABLE, f"{error.msg} at {place}"))
    except _DuplicateKey as error:
        return RawRow(line, raw, Rejection(Reason.DUPLICATE_KEY, printable(str(error)[:_KEY_CHARS])))
    except (ValueError, RecursionError) as error:
        return RawRow(line, raw, Rejection(Reason.UNPARSABLE, str(error)[:_DETAIL_CHARS]))
    if not isinstance(value, dict):
        return RawRow(line, raw, Rejection(Reason.NOT_AN_OBJECT, type(value).__name__))
    return object_row(line, raw, value, encoding)


def object_row(line: int, raw: str, value: dict[str, Any], encoding: str) -> RawRow:
    """One JSON object that was read from `raw`."""
    if not decodes(raw):
        return undecodable(line, raw, encoding)
    # Only an escape can smuggle half a character past the decoder.
    if "\\u" in raw and not decodes(json.dumps(value, ensure_ascii=False)):
        return RawRow(line, raw, Rejection(Reason.UNDECODABLE, "half a surrogate pair"))
    return RawRow(line, raw, value)
