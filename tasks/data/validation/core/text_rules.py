"""Rules about the text itself: tokens, broken characters, left-over markup, the language. All but two need no prompt.

Each rule is a function of a Case and answers with a detail, which never quotes the row, or None.
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from data_contracts.data_spec import RulesSpec
from data_contracts.rows import Message, Row

OwnFunction = Callable[[str, str], str | None]


class Case(NamedTuple):
    """A row as the rules see it; everything that several rules need is worked out once."""

    messages: tuple[Message, ...]
    prompt: str
    answer: str
    asked: str  # the prompt in lower case
    said: str  # the answer in lower case
    rules: RulesSpec
    max_chars: int
    own: OwnFunction | None


def case_of(row: Row, rules: RulesSpec, max_chars: int, own: OwnFunction | None) -> Case:
    """The case of a row that ends with an answer."""
    prompt, answer = row.prompt, row.completion
    return Case(row.messages, prompt, answer, prompt.lower(), answer.lower(), rules, max_chars, own)


_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)


def prose(text: str) -> str:
    """The text without its code blocks and `inline code`."""
    return _CODE.sub(" ", text) if "`" in text else text


# Written into a row, these end the turn and open another one. Plain `<s>` and `</s>` are left alone: they are also
# HTML. So is `### Response:` above a code block: the documentation of an API.
_TEMPLATE_TOKEN: Final = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|end_of_text|begin_of_text|eot_id|eom_id|start_header_id|end_header_id"
    r"|system|user|assistant|end)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)
_TURN_MARKER: Final = re.compile(
    r"^### ?(?:Instruction|Response):[ \t]*$(?!\s*```)|^<(?:user|assistant|human|bot|system)>:", re.MULTILINE
)


def no_template_tokens(case: Case) -> str | None:
    for index, (role, text) in enumerate(case.messages):
        found = _TEMPLATE_TOKEN.search(text) if "<" in text or "[" in text else None
        if not found and ("###" in text or ">:" in text):
            found = _TURN_MARKER.search(_CODE.sub("```", text))
        if found:
            return f"{found[0].strip()} in message {index + 1} ({role})"
    return None


# U+FFFD itself, read as Latin-1, and read as GBK.
_BROKEN: Final = ("\ufffd", "\u00ef\u00bf\u00bd", "\u951f\u65a4\u62f7")
_ABOUT_ENCODING: Final = re.compile(r"encod|unicode|utf-?8|mojibake|replacement char|u\+fffd|编码|乱码|锟斤拷是")


def no_broken_text(case: Case) -> str | None:
    for index, (role, text) in enumerate(case.messages):
        if text.isascii() or not any(sign in text for sign in _BROKEN):
            continue
        if _ABOUT_ENCODING.search(case.asked):
            return None
        return f"{sum(text.count(sign) for sign in _BROKEN)} replacement characters in message {index + 1} ({role})"
    return None


_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202d\u202e]")
_BIDI: Final = re.compile("[\u202a-\u202c\u2066-\u2069]")
_RIGHT_TO_LEFT: Final = re.compile("[\u0590-\u08ff]")


def no_control_characters(case: Case) -> str | None:
    for index, (role, text) in enumerate(case.messages):
        # The quick way out for nearly every row: the regular expressions cost ten times as much.
        if text.isprintable() or text.replace("\n", "").isprintable():
            continue
        found = _CONTROL.search(text)
        if not found and not text.isascii() and (bidi := _BIDI.search(text)):
            # Arabic and Hebrew need embeddings and isolates; nothing needs an override.
            found = None if _RIGHT_TO_LEFT.search(text) else bidi
        if found:
            return f"U+{ord(found[0]):04X} in message {index + 1} ({role})"
    return None


# Closing tags, and opening ones that are no mathematics: `a <b> c` and `List<p>` stay.
_MARKUP: Final = re.compile(
    r"</(?:a|b|i|u|p|em|strong|div|span|font|li|ul|ol|td|tr|th|table|h[1-6]|body|html|center|sup|sub)>"
    r"|<(?:br|hr|div|span|font|li|ul|ol|td|tr|table|h[1-6]|strong|em|img|center)(?:\s[^<>]*)?/?>|<a\s+href"
    r"|&(?:nbsp|amp|lt|gt|quot|apos|ldquo|rdquo|lsquo|rsquo|mdash|ndash|hellip|#\d{2,5}|#x[0-9a-f]{2,5});"
)
_ABOUT_MARKUP: Final = re.compile(
    r"html|xml|svg|css|jsx|\bweb|\bcode|\btags?\b|markup|markdown|script|react|vue|template|entit|escap|\bparse"
    r"|program|网页|代码|标签|程序|前端"
)


def no_markup(case: Case) -> str | None:
    said = case.said
    if "<" not in said and "&" not in said:
        return None
    found = _MARKUP.findall(prose(said))
    if not found or _ABOUT_MARKUP.search(case.asked) or found[0] in case.asked:
        return None
    return f"{len(found)} tags or entities in the answer"


# The prompt asks for another language, or names one.
_ABOUT_LANGUAGE: Final = re.compile(
    r"translat|übersetz|tradu[ciz]|перев|翻译|翻訳|번역|译成|译为|language|bilingual|loanword"
    r"|\b(?:english|chinese|mandarin|spanish|french|german|italian|portuguese|russian|japanese|korean|arabic|hindi"
    r"|latin|greek|hebrew|dutch|turkish|polish|swedish|ukrainian|vietnamese|thai)\b"
    r"|英语|英文|中文|汉语|法语|德语|日语|日文|俄语|西班牙语|韩语|文言文"
)
_CODE_SIGN: Final = re.compile(
    r"[{};]\s*$|^\s*(?:def|class|import|from|return|select|#include)\b|\w\(.*\)", re.MULTILINE
)
_MIN_LANGUAGE_CHARS: Final = 40  # half of it where the letters are not ASCII
_SHORT_ITEM: Final = re.compile(
    r"^\s*(?:[-*\u2022]|\d+[.)])[^\n]{0,30}$", re.MULTILINE
)  # dishes and drugs keep their names


def _checked_prose(case: Case) -> str | None:
    """The part of the answer whose language may be checked; None for translations, code and short answers."""
    if not case.rules.languages or _ABOUT_LANGUAGE.search(case.asked):
        return None
    text = _SHORT_ITEM.sub("", prose(case.answer)).strip()
    if len(text) < (_MIN_LANGUAGE_CHARS if text.isascii() else _MIN_LANGUAGE_CHARS // 2):
        return None
    return None if len(_CODE_SIGN.findall(text)) * 3 > text.count("\n") + 2 else text


# Without its own script a text is not in that language: lists of Chinese terms are taken for Japanese or German.
_OWN_SCRIPT: Final = {"ja": re.compile("[\u3040-\u30ff]"), "ko": re.compile("[\uac00-\ud7af]")}
_NOT_LATIN: Final = frozenset(
    {"zh", "ja", "ko", "ru", "uk", "bg", "be", "mk", "kk", "mn", "ar", "fa", "ur", "he", "el", "hi", "th"}
)
_CJK: Final = re.compile("[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]")
_LATIN_WORD: Final = re.compile("[A-Za-z]{4,}")


def in_an_allowed_language(case: Case) -> str | None:
    if (text := _checked_prose(case)) is None:
        return None
    from tasks.data.validation.core.languages import language  # only runs that name languages pay for it

    found = language(text)
    if found is None or found in case.rules.languages:
        return None
    script = _LATIN_WORD if found not in _NOT_LATIN else _OWN_SCRIPT.get(found)
    if script and not script.search(text):
        return None
    # A Chinese question about an English word is answered in English.
    if script is _LATIN_WORD and _CJK.search(case.prompt) and _LATIN_WORD.search(case.prompt):
        return None
    return f"the answer is {found}, allowed: {', '.join(case.rules.languages)}"


# A run in another script, long enough to be more than a name; and the languages that may hold it.
_SCRIPTS: Final = (
    (
        "Han",
        re.compile(r"(?:[\u4e00-\u9fff]{2,}[\uff0c。、\uff1b\uff1a\uff01\uff1f]?){4,}|[\u4e00-\u9fff]{12,}"),
        {"zh", "ja", "ko"},
    ),
    ("Kana", re.compile(r"[\u3040-\u30ff]{3,}[\u3040-\u30ff\u4e00-\u9fff]{6,}"), {"ja"}),
    ("Hangul", re.compile(r"(?:[\uac00-\ud7af]+\s+){3,}"), {"ko"}),
    ("Cyrillic", re.compile(r"(?:[\u0400-\u04ff]+[\s,]+){3,}"), {"ru", "uk", "bg", "be", "sr", "mk", "kk", "mn"}),
    ("Arabic", re.compile(r"(?:[\u0600-\u06ff]+\s+){3,}"), {"ar", "fa", "ur"}),
)
_LATIN_RUN: Final = re.compile(r"(?:[A-Za-z']{2,}[ ,]+){12,}")


def in_one_language(case: Case) -> str | None:
    if (text := _checked_prose(case)) is None:
        return None
    allowed = case.rules.languages
    for script, run, languages in () if text.isascii() else _SCRIPTS:
        if languages.isdisjoint(allowed) and run.search(text):
            return f"a passage in {script} script, allowed: {', '.join(allowed)}"
    if _NOT_LATIN.issuperset(allowed) and not _LATIN_WORD.search(case.prompt) and _LATIN_RUN.search(text):
        return f"a passage in Latin script, allowed: {', '.join(allowed)}"
    return None
