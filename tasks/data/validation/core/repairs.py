"""Text is repaired only where it is surely damaged: what an author may have meant stays as it is.

Full-width letters, curly quotes, ligatures, the ideographic space and a literal backslash-n are no damage.
Example: repair("caf\\u00c3\\u00a9") == ("caf\\u00e9", ("mojibake",))
"""

import html
import re
import unicodedata
from collections.abc import Callable
from enum import StrEnum
from typing import Final

import ftfy
import ftfy.badness


class Repair(StrEnum):
    """Every repair, in the order in which they are tried; the values stand in reports."""

    MOJIBAKE = "mojibake"  # UTF-8 that was once read as another encoding
    HTML_ENTITIES = "html_entities"  # &amp; and the like in a text that is not about HTML
    NFC = "nfc"  # a letter and its accent as two characters
    LINE_ENDINGS = "line_endings"
    CONTROL_CHARACTERS = "control_characters"  # with the escape sequences of terminals
    ZERO_WIDTH = "zero_width"  # invisible characters that join or order nothing here
    SPACES = "spaces"


# A lossy sequence cannot be brought back, only replaced by U+FFFD: that row is for the rules to judge. The C1 controls
# are Windows' punctuation only where the text is mojibake at all.
_FIX = ftfy.TextFixerConfig(replace_lossy_sequences=False)

# `&amp;amp;lt;` is peeled in one go: each layer was one export too many.
_ENTITY = re.compile(r"&(?:amp;|#38;|#x26;)*(#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_MARKUP_OR_CODE = re.compile(
    r"</?[A-Za-z!?]|`|~~~|&&|[{}]\s*$|(?:[)\]'\"]|= ?\w+);\s*$"
    r"|^\s*(?:def|class|import|from|for|if|return|var|let|const|function|#include)\b.*[:;({]"
    r"|\b(?:HTML\d?|XHTML|XML|SGML|HREF|entit(?:y|ies)|escap\w+|unescap\w+|encod\w+|decod\w+|ampersands?|markup)\b"
    r"|转义|实体|编码|标签|网页",
    re.IGNORECASE | re.MULTILINE,
)

_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_INVISIBLE = re.compile("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
# Thai, Lao, Burmese and Khmer write no spaces: there the zero-width space marks where a line may break.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_JOINS_NOTHING = re.compile(
    f"[\u00ad\u2060\ufeff]|(?<![{_UNSPACED}])\u200b(?![{_UNSPACED}])|(?<![^\x00-\x7f])[\u200c\u200d]+(?![^\x00-\x7f])"
)
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)

_EXOTIC_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_FENCE = re.compile(r"[ \t]*(?:>[ \t]*)*(```|~~~)")
# Before a comment sign the spaces are code layout; after a mark like `=` or a bracket they may be too.
_LAYOUT_RUN = re.compile(r"""(?<=[^\W_]|[,.;:!?)"'\u2019\u201d%]) {3,}(?=[^\W_]|["'(\u2018\u201c$])""")
_PARAGRAPH = 80  # a line as long as this is no row of a timetable
_RUN = re.compile(r"\S\s{3,}\S")
_INDENTED = re.compile(r" {4}|\t")
_TABLE = re.compile(r"[|\t]|[^ ] {3,}[^ ].*[^ ] {3,}[^ ].* {3,}[^ ]")
_CODE_LINE = re.compile(r"//|/\*|[{};=]\s*$|[=+]=|\w\(\)|^\s*(?:#|--|>>>|\$) ?\w")


def _mojibake(text: str) -> str:
    if text.isascii() or not ftfy.badness.is_bad(text) or "mojibake" in text.casefold() or "乱码" in text:
        return text
    return ftfy.fix_encoding_and_explain(text, _FIX).text


def _entity(match: re.Match[str]) -> str:
    """What the entity stands for, or the entity itself where that is nothing sensible."""
    character = html.unescape(f"&{match[1]};")
    sensible = character and not character.endswith(";") and "\ufffd" not in character and character[0] >= " "
    return character if sensible else match[0]


def _html_entities(text: str) -> str:
    if "&" not in text or ";" not in text or not _ENTITY.search(text) or _MARKUP_OR_CODE.search(text):
        return text
    return _ENTITY.sub(_entity, text)


def _nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)  # quick where nothing is to be done


def _line_endings(text: str) -> str:
    return _BREAKS.sub("\n", text)


def _control_characters(text: str) -> str:
    return _CONTROLS.sub("", _ANSI.sub("", text)) if _CONTROLS.search(text) else text


def _zero_width(text: str) -> str:
    if text.isascii() or not _INVISIBLE.search(text):
        return text
    text = _JOINS_NOTHING.sub("", text)
    return text if _RIGHT_TO_LEFT.search(text) else _BIDI.sub("", text)


def _has_columns(lines: list[str]) -> bool:
    """Whether two short lines hold runs of spaces: then the runs are meant to align something."""
    return sum(len(line) < _PARAGRAPH and _RUN.search(line) is not None for line in lines) >= 2


def _prose_line(line: str, columns: bool) -> str:
    """The line without trailing white space; its runs of spaces collapse unless they lay out code or a table."""
    line = _EXOTIC_SPACE.sub(" ", line).rstrip()
    if columns or "   " not in line or _INDENTED.match(line) or _TABLE.search(line) or _CODE_LINE.search(line):
        return line
    return _LAYOUT_RUN.sub(" ", line)


def _outer_strip(text: str) -> str:
    """The text without outer white space; a first line keeps its indent where others are indented too."""
    text = text.rstrip()
    body = text.lstrip()
    indent = text[: len(text) - len(body)].rpartition("\n")[2]
    is_code = bool(indent) and any(line[:1] in {" ", "\t"} for line in body.split("\n")[1:] if line)
    return indent + body if is_code else body


def _spaces(text: str) -> str:
    """Tidies the lines outside of fences; more than two blank lines become one."""
    if not _looks_untidy(text):
        return text
    lines: list[str] = []
    fence, blank = "", 0
    columns = _has_columns(text.split("\n"))
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1] == fence else fence
            lines.append(line)
            continue
        line = _prose_line(line, columns)
        if not line:
            blank += 1
            continue
        lines.extend([""] * (blank if blank <= 2 else 1))
        blank = 0
        lines.append(line)
        # A fence that closes on its own line is inline code.
        fence = mark[1] if mark and mark[1] not in line[mark.end() :] else ""
    return _outer_strip("\n".join(lines))


def _looks_untidy(text: str) -> bool:
    """Plain substring searches: most texts are clean, which this finds out in a microsecond."""
    return bool(text) and (
        "   " in text
        or " \n" in text
        or "\t\n" in text
        or "\u3000\n" in text
        or "\n\n\n\n" in text
        or text[0].isspace()
        or text[-1].isspace()
        or (not text.isascii() and _EXOTIC_SPACE.search(text) is not None)
    )


_REPAIRS: Final[tuple[tuple[Repair, Callable[[str], str]], ...]] = (
    (Repair.MOJIBAKE, _mojibake),
    (Repair.HTML_ENTITIES, _html_entities),
    (Repair.NFC, _nfc),
    (Repair.LINE_ENDINGS, _line_endings),
    (Repair.CONTROL_CHARACTERS, _control_characters),
    (Repair.ZERO_WIDTH, _zero_width),
    (Repair.SPACES, _spaces),
)


def repair(text: str) -> tuple[str, tuple[str, ...]]:
    """The repaired text and the names of the repairs that changed it; repairing it again changes nothing."""
    if text.isascii() and "&" not in text and not _CONTROLS.search(text) and not _looks_untidy(text):
        return text, ()
    names: dict[str, None] = {}
    # One repair can lay bare the work of another (`&nbsp;` becomes a space), so all run until none has any left. This
    # ends: but for NFC, which settles at once, each repair shortens the text or replaces characters for good.
    while True:
        before = text
        for name, mend in _REPAIRS:
            mended = mend(text)
            if mended != text:
                names[name.value] = None
                text = mended
        if text == before:
            return text, tuple(name.value for name in Repair if name.value in names)
