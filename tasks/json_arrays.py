"""JSON arrays item by item: memory is bounded by the longest item, and a broken item is rejected alone."""

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final, TextIO

from tasks.raw_rows import RawRow, json_row
from tasks.text_files import open_text

_READ_CHARS: Final = 1 << 20
_LONGEST_ITEM_CHARS: Final = 64 << 20  # a broken item is looked at no further for the text that would close it
_LONGEST_TOKEN_CHARS: Final = 16  # an escape or a literal that the window's edge has cut
_BETWEEN: Final = re.compile(r"[ \t\r\n,]*")
_SCANNER: Final = json.JSONDecoder()


def read_array(path: Path, encoding: str) -> Iterator[RawRow]:
    """Every item with its number. What is left of a file that was cut is one rejected record."""
    with open_text(path, encoding) as file:
        window = _Window(file)
        for number in count(1):
            raw = window.next_item()
            if raw is None:
                return
            yield json_row(number, raw, encoding)


class _Window:
    """The part of an array's text that is in memory; what has been handed out is dropped as it moves on."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._ended, self._at = file, False, 0
        self._text = file.read(_READ_CHARS).lstrip()[1:]  # without the opening bracket
        indent = re.match(r"\s*?\n([ \t]*)\{", self._text)
        # Items on lines of their own are told by their indentation; of others only the end of an object is known.
        self._next = re.compile(rf"\n{indent[1]}\{{" if indent else r"(?<=\}),\s*\{")

    def next_item(self) -> str | None:
        """The text of the next item, or of what stands where one should be; None at the end of the array."""
        self._skip()
        if self._at >= len(self._text) or self._text[self._at] == "]":
            return None
        while True:
            try:
                end = _SCANNER.raw_decode(self._text, self._at)[1]
                if end < len(self._text) or self._ended:  # a number at the edge may go on
                    return self._take(end)
            except (ValueError, RecursionError) as error:
                if self._ended or not self._may_be_cut(error):
                    following = self._next.search(self._text, self._at + 1)
                    return self._take(following.start() if following else len(self._text))
            self._grow()

    def _may_be_cut(self, error: Exception) -> bool:
        """Whether more text could mend it: a string without an end, or an error at the edge of the window."""
        if len(self._text) - self._at > _LONGEST_ITEM_CHARS or not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _LONGEST_TOKEN_CHARS

    def _skip(self) -> None:
        while True:
            found = _BETWEEN.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or self._ended:
                return
            self._grow()

    def _grow(self) -> None:
        more = self._file.read(max(_READ_CHARS, len(self._text) - self._at))
        self._ended = not more
        self._text, self._at = self._text[self._at :] + more, 0

    def _take(self, end: int) -> str:
        item, self._at = self._text[self._at : end], end
        return item.strip().removesuffix(",").rstrip()
