"""Rules about the answer: placeholders, refusals, cut and looping answers, answers that need what is not there.

Each rule is a function of a Case and answers with a detail, which never quotes the row, or None. A rule reads the
prompt first for what makes the sign legitimate: a wrong rejection costs the user a row and their trust.
"""

import re
from typing import Final

from tasks.data.validation.core.text_rules import Case, prose

_GREETINGS: Final = frozenset({"hi", "hello", "hey", "bye", "goodbye", "good morning", "good night", "thanks", "你好"})
_RETURNS_ITS_INPUT: Final = re.compile(
    r"correct|proofread|translat|rewrite|normali|repeat|echo|copy|fix|校对|纠正|重复"
)


def differs_from_the_question(case: Case) -> str | None:
    question, answer = case.messages[-2].content, case.answer
    # White space apart, equal texts have equal first letters: nearly every row leaves here.
    if question.lstrip()[:1].casefold() != answer.lstrip()[:1].casefold():
        return None
    said = " ".join(answer.casefold().split())
    if " ".join(question.casefold().split()) != said or said.rstrip("!.。\uff01") in _GREETINGS:
        return None
    system = case.messages[0].content.lower() if case.messages[0].role == "system" else ""
    # Asked to correct or to repeat, an answer may well be what it was given.
    return None if _RETURNS_ITS_INPUT.search(system) else f"{len(answer)} characters"


_PLACEHOLDERS: Final = frozenset(
    {
        "n/a", "na", "todo", "tbd", "fixme", "nooutput", "no output", "noinput", "no input", "nan", "none", "null",
        "undefined", "placeholder", "insert answer here", "answer here", "your answer here", "output here",
        "待补充", "暂无回答", "暂无答案", "无输出", "此处填写",
    }
)  # fmt: skip
# Values of programs, and true answers to "which of these ...?".
_VALUES: Final = frozenset({"none", "null", "nan", "undefined", "na", "n/a", "no output"})
_ASKS_FOR_A_VALUE: Final = re.compile(
    r"\b(?:return|print|output|function|evaluat|value|python|sql|javascript|code|which|how many|any|find|extract"
    r"|identify|list|label|classif|categor|name the|if there|chemical|symbol|element|program|was ist|wie viel)"
)
_INSERT: Final = re.compile(r"[\[<({]+\s*(?:insert|your|add|enter|fill|put|placeholder)\b[^\])>}]*[\])>}]+")
_LONGEST_PLACEHOLDER: Final = 80


def is_no_placeholder(case: Case) -> str | None:
    said = case.said.strip()
    if said.startswith("lorem ipsum"):
        return None if re.search(r"lorem|placeholder|dummy|filler", case.asked) else "lorem ipsum"
    if len(said) > _LONGEST_PLACEHOLDER:
        return None
    bare = said.strip(" .<>[](){}\"'*_`!。")
    if not bare:
        # Dots alone; brackets and quotation marks alone can be the answer to a question about code.
        return "only dots" if said in {"...", "..", "…", "……"} and said not in case.asked else None
    if bare == "todo" and "TODO" not in case.answer:
        return None  # Spanish for "all"
    if bare in _PLACEHOLDERS:
        if re.search(rf"(?<![a-z]){re.escape(bare)}(?![a-z])", case.asked):
            return None
        return None if bare in _VALUES and _ASKS_FOR_A_VALUE.search(case.asked) else f"the whole answer is {bare}"
    return "the whole answer is a slot to fill in" if _INSERT.fullmatch(said) and said not in case.asked else None


# Not `${{ }}` of a workflow file, nor the doubled braces of LaTeX.
_FIELD: Final = re.compile(r"(?<![\w$\\^_}{])\{\{\s*[a-z]\w[\w .-]{0,40}\}\}")
_SLOT: Final = re.compile(
    r"\[(?:your|insert|enter|recipient|customer|company|sender|hiring manager|manager|client|first|last|full"
    r"|employee|contact|candidate)(?:'s)?[ _](?:name|full name|first name|last name|company|address|email|e-mail"
    r"|phone|phone number|email address|title|position|date|city|number|here|company name|signature|contact"
    r" information|job title|organization|[a-z]{3,20} here)\](?!\()"
    r"|\[(?:insert|enter|fill in) [^\]\n]{2,60}\](?!\()|\[(?:name|date|company name|company|address|phone number)\](?!\()"
)
_ABOUT_TEMPLATES: Final = re.compile(
    r"templat|jinja|handlebars|mustache|vue|angular|liquid|placeholder|fill[- ]in|blank|\bcode\b|html|python|script"
    r"|boilerplate|variable|ansible|helm|yaml|workflow|wiki|latex|config|redact|anonymi|mask|replace|sample (?:letter|e-?mail)|模板|占位"
)

_ASKS_FOR_A_LETTER: Final = re.compile(
    r"\b(?:write|writing|draft|compose|create|generate|prepare|craft|sending|reply|respond|closing)\b[^\n]{0,80}"
    r"\b(?:letter|e-?mail|invitation|memo|press release|speech|resume|contract|message|note)"
)


def has_no_open_slots(case: Case) -> str | None:
    said = case.said
    if "{{" not in said and "[" not in said:
        return None
    text = prose(said)
    # The writer of a letter does not know whose name to put below it; a {{name}} is a program's work left undone.
    patterns = (_FIELD,) if _ASKS_FOR_A_LETTER.search(case.asked) else (_FIELD, _SLOT)
    slots = {slot[0] for pattern in patterns for slot in pattern.finditer(text) if slot[0] not in case.asked}
    if not slots or _ABOUT_TEMPLATES.search(case.asked):
        return None
    return f"{len(slots)} slots never filled in"


_REFUSAL: Final = re.compile(
    r"\bas an? (?:ai\b|artificial intelligence|(?:large )?language model|digital assistant)[^.]{0,60}"
    r"\b(?:cannot|can't|do not|don't|am unable|am not able|am not capable|not have)"
    r"|\bi(?:'m| am) (?:unable|not able) to (?:assist|help|provide|fulfil|comply|answer|generate|create|write|complete"
    r"|process this|respond)"
    r"|\bi (?:cannot|can't|can not|won't|will not) (?:assist|help you with|help with|provide|fulfil|comply|answer"
    r"|generate|create|write|complete this|engage|support|condone|respond)"
    r"|\bi(?:'m| am) sorry,? but i (?:cannot|can't|do not|don't|need more)"
    r"|作为一?(?:个|名|款)?(?:ai|人工智能|大?语言模型|智能助手)[^。]{0,8}我[^。]{0,20}(?:无法|不能|没有|不具备|不会)"
    r"|(?:抱歉|对不起)[\uff0c,]?(?:但)?(?:我)?(?:无法|不能|没有办法|没法)"
    r"|我(?:无法|不能)(?:提供|完成|回答|生成|协助|满足|执行)"
)
_REFUSAL_SIGNS: Final = ("i can", "unable", "not able", "as a", "i w", "sorry", "无法", "不能", "没", "不会", "不具备")
_REFUSED_WITHIN: Final = 240  # characters: later in the text it is a quotation or a caveat


def does_not_refuse(case: Case) -> str | None:
    start = case.said[:_REFUSED_WITHIN].replace("\u2019", "'")
    if not any(sign in start for sign in _REFUSAL_SIGNS):
        return None
    found = _REFUSAL.search(start)
    # A support agent that regrets has not refused, and a quoted refusal is somebody else's.
    return f"a refusal at character {found.start() + 1}" if found else None


_LIST_ITEM: Final = re.compile(r"\s*(?:[-*•\u2013+|#>]|\(?\w{1,3}[.)])\s*\S")
_SENTENCE_END: Final = re.compile(r"[a-z)][.!?][\"”')]?\s")
_CONNECTIVES: Final = frozenset(
    {
        "and", "or", "but", "the", "a", "an", "of", "to", "with", "because", "that", "which", "for", "from", "by", "as",
        "when", "while", "if", "their", "its", "your",
    }
)  # fmt: skip
_MIN_PROSE: Final = 200  # characters
_MIN_LAST_LINE: Final = 60


def comes_to_an_end(case: Case) -> str | None:
    answer = case.answer.rstrip()
    if len(answer) < _MIN_PROSE or not (answer[-1].isalnum() or answer[-1] in ",\uff0c、"):
        return None
    if not answer[-1].isascii():
        return "ends with a comma" if answer[-1] in "\uff0c、" else None
    start = answer.rfind("\n") + 1
    last_line = answer[start:]
    # Titles, verses, list items and code have no full stop; one in prose is known by the sentences before it.
    is_item = _LIST_ITEM.match(last_line) and not _SENTENCE_END.search(last_line)
    if len(last_line) < _MIN_LAST_LINE or is_item or len(_SENTENCE_END.findall(answer)) < 2:
        return None
    last_word = last_line.split()[-1].lower()
    if "```" in answer or any(sign in last_word for sign in "./@_=(){}:#\\"):
        return None
    if answer[-1] == "," or last_word in _CONNECTIVES:
        return "ends with a comma" if answer[-1] == "," else "ends with a connective"
    return "ends without punctuation" if _reads_as_a_sentence(_SENTENCE_END.split(last_line)[-1]) else None


def _reads_as_a_sentence(tail: str) -> bool:
    """False for a flattened list and for a name: the publisher's after the text, say."""
    if "  " in tail or " - " in tail or ":" in tail:
        return False
    first = tail.split()[0]
    if first[0].isupper() and first.lower() in _CONNECTIVES:
        return True
    words = [word for word in tail.split() if len(word) > 3]
    return sum(word[0].isupper() for word in words) * 3 <= len(words)


def _open_fence(text: str) -> int:
    """Length of the code fence that is open at the end of the text, 0 if none is; longer fences hold shorter ones."""
    opened = 0
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped.startswith("```"):
            continue
        ticks = len(stripped) - len(stripped.lstrip("`"))
        if "`" in stripped[ticks:] or ticks < opened:
            continue
        opened = 0 if opened else ticks
    return opened


def closes_its_code(case: Case) -> str | None:
    if "```" not in case.answer or not _open_fence(case.answer):
        return None
    # An answer may close what its prompt has opened.
    return None if "```" in case.prompt and _open_fence(case.prompt) else "a code fence is left open"


_MAX_PERIOD: Final = 40  # tokens
_MIN_LOOP_CHARS: Final = 200
_ASKS_FOR_LOOPS: Final = re.compile(r"repeat|\btimes\b|song|lyric|poem|chant|mantra|loop|survey|重复|歌|诗|遍")


def does_not_loop(case: Case) -> str | None:
    answer = case.answer
    size = len(answer)
    if size < _MIN_LOOP_CHARS:
        return None
    # A loop that fills most of the text stands at one of these places; counting is far cheaper than looking for it.
    if not any(answer.count(answer[at : at + 8]) >= 5 for at in (size // 4, size // 2, size * 3 // 4, size - 10)):
        return None
    if _ASKS_FOR_LOOPS.search(case.asked):
        return None
    words = prose(answer).split()
    tokens = words if len(words) * 12 > size else list(prose(answer))
    for period in range(1, min(_MAX_PERIOD, len(tokens) // 5) + 1):
        length, end = _longest_run(tokens, period)
        unit = tokens[end - period : end]
        repeats = length // period
        letters = sum(character.isalpha() for token in set(unit) for character in token)
        # Numbers, rows of tables and "ha ha ha" repeat by nature.
        if repeats * sum(map(len, unit)) < _MIN_LOOP_CHARS or letters < 3 or any("|" in token for token in unit):
            continue
        if repeats >= 8 or (repeats >= 5 and length > 0.6 * len(tokens)):
            return f"{period} tokens repeated {repeats} times"
    return None


def _longest_run(tokens: list[str], period: int) -> tuple[int, int]:
    """Length and end of the longest stretch in which each token equals the one `period` before it."""
    best = end = run = 0
    for index in range(period, len(tokens)):
        run = run + 1 if tokens[index] == tokens[index - period] else 0
        if run > best:
            best, end = run, index + 1
    return best + period, end


_URL: Final = re.compile(r"<?(?:https?://|www\.)\S+")
_ASKS_FOR_A_URL: Final = re.compile(
    r"\b(?:links?|urls?|uri|web ?sites?|web ?pages?|pages?|sites?|home ?page|where|address|domain|download|docs?"
    r"|documentation|source|reference|http)|链接|网址|网站|地址|哪里|主页"
)


def is_more_than_a_url(case: Case) -> str | None:
    said = case.said.strip()
    if not said.startswith(("http", "www.", "<http", "<www.")) or not _URL.fullmatch(said):
        return None
    return None if _ASKS_FOR_A_URL.search(case.asked) else f"{len(said)} characters, all of it one address"


_EMBEDDED: Final = re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)|<image>|<img\s|\[image(?: ?\d)?\]")
_PICTURE: Final = r"(?:image|picture|photo|photograph|screenshot)s?"
_REFERS: Final = re.compile(
    rf"\b(?:the|this|my|see) (?:attached|above|enclosed) {_PICTURE}\b"
    rf"|\bthe {_PICTURE} (?:above|below|attached|enclosed|i (?:sent|uploaded|attached))\b"
    r"(?! (?:the|a|an|my|his|her|their|our|your|it|to)\b)"
    r"|(?:如|见)(?:上|下)图|(?:上|下)图(?:中|所示)|(?:这|该)张(?:图片|照片)中"
)
_ABOUT_IMAGES: Final = re.compile(
    r"markdown|html|readme|\bcode\b|css|alt[- ]text|description[:\uff1a]|described as|web ?page|latex|e-?mail|letter|story|描述"
)
_IMAGE_SIGNS: Final = ("image", "picture", "photo", "screenshot", "![", "<img", "图")


def needs_no_image(case: Case) -> str | None:
    for part, text in (("prompt", case.asked), ("answer", case.said)):
        if not any(sign in text for sign in _IMAGE_SIGNS):
            continue
        text = prose(text)
        found = _EMBEDDED.search(text) or _REFERS.search(text)
        if found and not _ABOUT_IMAGES.search(case.asked):
            return f"the {part} needs an image, at character {found.start() + 1}"
    return None


_TAKES_FROM_THE_PROMPT: Final = re.compile(
    r"extract|quot|edit|correct|translat|summar|classif|categor|rewrit|which|find|identif|copy|repeat|paraphras|fix"
    r"|proofread|choose|select|option|passage|context|according|sentence|paragraph|article|text|remove|delete|replace"
    r"|sort|order|arrange|highlight|underline|pick|answer the question|multiple|提取|引用|修改|翻译|总结|分类|改写|哪"
    r"|找出|选择|选项|排序|删除|摘录|复制|重复|纠正|句子|文章|段落"
)
_HAN: Final = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_MIN_LEAKED_CHARS: Final = 20
_MIN_LEAKED_WORDS: Final = 8  # of a script that puts spaces between its words


def adds_to_the_prompt(case: Case) -> str | None:
    said = case.said.strip()
    if len(said) < _MIN_LEAKED_CHARS or len(said) > len(case.asked) or said not in case.asked:
        return None
    is_short = len(said.split()) < _MIN_LEAKED_WORDS and not _HAN.search(said)
    if is_short or _TAKES_FROM_THE_PROMPT.search(case.asked.replace(said, "")):
        return None
    return f"all {len(said)} characters of the answer stand in the prompt"
