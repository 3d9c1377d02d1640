"""JSON records one by one: one a line, over several lines, glued together, or the items of an array.

Memory is bounded by the longest record. What cannot be read is one rejected record, up to the next place at which a
record can safely start: an unescaped `{"first field":` stands in no string, and objects of one record are parted by
commas.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TextIO

from tasks.data.ingestion.encodings import open_text
from tasks.data.ingestion.raw_rows import RawRow, json_row, object_row, scan_object

_READ_CHARS: Final = 1 << 16  # an error costs a pass over all of them: the decoder counts their lines
_LONGEST_RECORD_CHARS: Final = 64 << 20  # a broken record is looked at no further for the text that would close it
_LONGEST_TOKEN_CHARS: Final = 16  # an escape or a literal that the window's edge has cut
_LONGEST_INDENT_CHARS: Final = 256
_MARK: Final = "\ufeff"  # files that were joined keep the byte order mark of each part
_OBJECT: Final = re.compile(r'\{\s*("(?:[^"\\\n]|\\.)*")\s*:')
_BEFORE_FIRST: Final = re.compile(r"[\s\ufeff]*(?:\[\s*)?")
# Finds where a value ends, whatever its numbers are.
_SCANNER: Final = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


def read_json_records(path: Path, encoding: str) -> Iterator[RawRow]:
    """Every record with the line it starts in (items of an array: with their number); the content shows the layout."""
    with open_text(path, encoding) as file:
        text = file.read(_READ_CHARS)
        layout = _Array if _holds_array(text, len(text) < _READ_CHARS) else _Lines
        records = layout(file, text)
        while records.move_to_next():
            yield records.take(encoding)


def _holds_array(text: str, whole: bool) -> bool:
    """Whether an array holds the records: each line may be a list of its own, or a broken first line may look like one."""
    text = text.lstrip(f"{_MARK} \t\r\n")
    if not text.startswith("["):
        return False
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if len(lines) > 1 and not whole:
        lines.pop()  # it may be cut
    first, *others = lines
    if _is(first, list):
        return not others or others[0][0] not in ("{" if re.match(r"\[\s*\{", first) else "[{")
    return sum(_is(line, dict) for line in others) <= len(others) / 2


def _is(text: str, kind: type) -> bool:
    try:
        return isinstance(_SCANNER.decode(text), kind)
    except (ValueError, RecursionError):
        return False


def _start(record: re.Match[str]) -> str:
    """A pattern of how records start, by the name of the first field of one of them."""
    return rf"(?=\{{\s*{re.escape(record[1])}\s*:)"


def _indent(text: str, at: int) -> int:
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return len(line) - len(line.lstrip())


def _size(text: str, start: int) -> int:
    try:
        return _SCANNER.raw_decode(text, start)[1] - start
    except (ValueError, RecursionError):
        return 0


class _Records:
    """The part of the text that is in memory, and the place in it; what was handed out is dropped as it moves on."""

    _between: re.Pattern[str]
    _after: re.Pattern[str]  # what may stand behind a whole record

    def __init__(self, file: TextIO, text: str) -> None:
        self._file, self._text, self._at, self._ended = file, text, 0, False
        self.place = 1
        before = _BEFORE_FIRST.match(text)
        at = before.end() if before else 0
        first = _OBJECT.match(text, at)
        self._indent = _indent(text, at)
        self._start = _start(first) if first else r"(?!)"
        # A line that starts as the first record does is a record, even where a broken one could take it in.
        self._sibling = re.compile(rf"\n[^\S\n]{{0,{self._indent}}}{self._start}")

    def move_to_next(self) -> bool:
        """Move to the first character of a record; False at the end of the file."""
        raise NotImplementedError

    def _broken_end(self, offset: int) -> int:
        """How long a broken record is, looking for its end from `offset` on."""
        raise NotImplementedError

    def take(self, encoding: str) -> RawRow:
        """The record that starts here."""
        place = self.place
        try:
            value, end = scan_object(self._text, self._at)
            after = self._after.match(self._text, end)
            if isinstance(value, dict) and after and after.end() < len(self._text) and not self._swallows(end):
                raw = self._text[self._at : end]
                self._move(after.end())
                return object_row(place, raw, value, encoding)
        except (ValueError, RecursionError):
            pass  # `json_row` reports why not, once it is known how far the record goes
        length = self._length()
        end = self._at + length  # reading on has moved the place
        raw = self._text[self._at : end]
        after = self._after.match(self._text, end)
        self._move(after.end() if after else end)
        return json_row(place, self._tidy(raw), encoding)

    def _tidy(self, raw: str) -> str:
        return raw.strip()

    def _length(self) -> int:
        """How long the record is that starts here, whole or broken. Reads on if it may be cut by the window's edge."""
        while True:
            end = self._value_end()
            if end is None:
                return self._broken_end(1)
            after = self._after.match(self._text, end)
            if self._swallows(end):
                return self._broken_end(1)
            if not after:
                return self._broken_end(end - self._at if self._text[self._at] == "{" else 1)
            if after.end() < len(self._text) or not self._grow():
                return end - self._at

    def _swallows(self, end: int) -> bool:
        return self._text.find("\n", self._at, end) > 0 and self._sibling.search(self._text, self._at, end) is not None

    def _value_end(self) -> int | None:
        """Where the JSON value ends that starts here; None if it is broken."""
        while True:
            end = None
            try:
                end = _SCANNER.raw_decode(self._text, self._at)[1]
                if end < len(self._text):  # a number at the edge may continue
                    return end
            except (ValueError, RecursionError) as error:
                if not self._may_be_cut(error):
                    return None
            if not self._grow():
                return end

    def _may_be_cut(self, error: Exception) -> bool:
        """Whether more text could mend it: a string without an end, or an error at the edge of the window."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _LONGEST_TOKEN_CHARS

    def _find(self, pattern: str, offset: int) -> int | None:
        """The end of the first match from `offset` on, from here; reads on until there is one."""
        compiled = re.compile(pattern)
        while True:
            if found := compiled.search(self._text, self._at + offset):
                return found.end() - self._at
            if not self._grow():
                return None

    def _move(self, end: int) -> None:
        self._at = end

    def _skip(self) -> bool:
        while not self._text.startswith("{", self._at):
            found = self._between.match(self._text, self._at)
            self._move(found.end() if found else self._at)
            if self._at < len(self._text):
                return True
            if not self._grow():
                return False
        return True

    def _grow(self) -> bool:
        """Read on; False, and nothing has moved, at the end of the file or if the record is too long."""
        rest = len(self._text) - self._at
        more = "" if self._ended or rest > _LONGEST_RECORD_CHARS else self._file.read(max(_READ_CHARS, rest))
        self._ended = self._ended or not more
        if more:
            line = self._text.rfind("\n", 0, self._at) + 1
            dropped = max(line, self._at - _LONGEST_INDENT_CHARS)
            self._text, self._at = self._text[dropped:] + more, self._at - dropped
        return bool(more)


class _Lines(_Records):
    """Objects one after the other, each in a line of its own, over several lines, or glued to the one before."""

    _between = re.compile(r"[\s\ufeff]*")
    _after = re.compile(r"[^\S\n]*,?(?:[^\S\n]|\ufeff)*(?:\n|(?=\{)|\Z)")
    _glued = r'\}(?=[^\S\n]*\{\s*")'

    def move_to_next(self) -> bool:
        return self._skip()

    def _move(self, end: int) -> None:
        self.place += self._text.count("\n", self._at, end)
        self._at = end

    def _broken_end(self, offset: int) -> int:
        """Its line, or, if the line stays open, all up to the next line that opens or closes a record."""
        records = rf"{self._glued}|{self._start}"
        length = self._find(rf"\n|{records}", offset)
        if length is None:
            return len(self._text) - self._at
        line = self._text[self._at : self._at + length]
        if not (line.endswith("\n") and line[0] in '{["' and line.rstrip()[-1] in "{[,:"):
            return length
        border = rf"\n[^\S\n]{{0,{_indent(self._text, self._at)}}}(?:(?=\{{)|[}}\]])"
        return self._find(rf"{border}|{records}", length - 1) or len(self._text) - self._at


class _Array(_Records):
    """The items of one array, or of several one after the other."""

    _between = re.compile(r"[\s,\ufeff]*")
    _after = re.compile(r"\s*(?:,\s*|(?=[\]{])|\Z)")

    def __init__(self, file: TextIO, text: str) -> None:
        super().__init__(file, text)
        self.place = 0
        self._closed = True
        in_lines = re.match(r"[\s\ufeff]*\[\s*\n", text)
        flat = re.match(r"[\s\ufeff]*\[[^\S\n]*\{", text)
        if flat and not _size(text, flat.end() - 1) and (objects := list(_OBJECT.finditer(text))):
            # The first item is broken: the longest object in sight is taken for one that is not.
            self._start = _start(max(objects, key=lambda found: _size(text, found.start())))
        # Items on lines of their own are found by their indentation; of others only the end of an object is known.
        border = rf"\n[^\S\n]{{0,{self._indent}}}(?=\{{)|{self._start}"
        self._border = border if in_lines else rf"{border}|\}}\s*,?\s*(?=\{{)"

    def move_to_next(self) -> bool:
        """Brackets between items are no items: arrays may follow each other, and damage may have added one."""
        while self._skip():
            bracket = self._text[self._at]
            if bracket == "]":
                self._closed = True
            elif bracket == "[" and (self._closed or self._opens_item(self._at + 1)):
                self._closed = False
            else:
                self.place += 1
                return True
            self._at += 1
        return False

    def _opens_item(self, at: int) -> bool:
        return re.compile(rf"\s*{self._start}").match(self._text, at) is not None

    def _broken_end(self, offset: int) -> int:
        if self._text[self._at] == "}":  # what is left of an item that was cut
            return 1
        return self._find(self._border, offset) or len(self._text) - self._at

    def _tidy(self, raw: str) -> str:
        return raw.strip().removesuffix(",").rstrip()
