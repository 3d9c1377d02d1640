"""Which rows say the same: texts made comparable, and 64-bit hashes of what must be equal in exact copies.

Two of a million rows share a hash by chance in one data set of 40 million (birthday bound, 2^64).
"""

import unicodedata
from collections.abc import Sequence

import xxhash

from data_contracts.rows import Message


def normalise(text: str) -> str:
    """NFC, case folded, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def content_hash(messages: Sequence[Message]) -> int:
    """Signed 64 bits, equal for exact copies: the same roles and normalised texts."""
    return _hash("\0".join(f"{role}\0{normalise(content)}" for role, content in messages))


def answer_hash(messages: Sequence[Message]) -> int:
    """Signed 64 bits of the normalised answer."""
    return _hash(normalise(messages[-1].content))


def prompt_hash(messages: Sequence[Message]) -> int:
    """Signed 64 bits of all that stands before the answer, normalised."""
    return content_hash(messages[:-1])


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) - 2**63
