"""Passwords, keys and tokens are taken out of text before anyone reads or stores it."""

import re
from typing import Final

from data_contracts.errors import error_chain

_SECRETS: Final = (
    (re.compile(r"(?<=://)[^/@\s'\"]+@"), ""),  # user:password of an address
    (re.compile(r"(?<=[/\w])\?[^\s'\")>]+"), ""),  # a query may hold a token or a signature
    (re.compile(r"\bhf_[A-Za-z0-9]{6,}"), "hf_..."),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ..."),
    (re.compile(r"(?i)\b(password|token|secret|api[_-]?key)(['\"]?\s*[=:]\s*)['\"]?[^\s,'\")}]+"), r"\1\2..."),
)


def without_secrets(words: str) -> str:
    """A text without what looks like a login: of an address, a query, a header, a token."""
    for pattern, instead in _SECRETS:
        words = pattern.sub(instead, words)
    return words


def has_secret(error: BaseException) -> bool:
    """Whether an error's chain says what looks like a login, so that it must not reach a log."""
    return any(without_secrets(str(link)) != str(link) for link in error_chain(error))
