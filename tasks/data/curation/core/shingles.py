"""Texts as numbers: 64-bit hashes of words and of runs of words, the same in every process and on every machine.

A batch of texts is one array of code points; words are found, hashed and combined by a dozen numpy passes over it and
no Python object is made for a word. Word hash: sum over its characters of v(c) B^i modulo 2^64 (Karp and Rabin 1987,
doi:10.1147/rd.312.0249) with pseudo-random v, so that prefix sums give every word; then SplitMix64's finaliser
(https://prng.di.unimi.it/splitmix64.c).
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

# Kana, ideographs, Hangul syllables; Thai, Lao, Burmese, Khmer: a character there says about as much as a word.
_SINGLE: Final = (
    r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7a3\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
_LETTERS: Final = re.compile(rf"[^\W{_SINGLE}]+")
_WORD: Final = re.compile(rf"[^\W{_SINGLE}]+|\S")
_BLANK, _LETTER, _SIGN = 0, 1, 2  # what a character is: no word, part of a word, a word of its own
_BETWEEN_TEXTS: Final = "\x1e"  # white space to str.split and to the pattern: replaced in a text it changes no word
_BATCH_CHARACTERS: Final = 1 << 18  # arrays of two megabytes stay in the cache
_BASE: Final = 0x9E3779B97F4A7C15 | 1
_CODE_POINTS: Final = 0x110000


def words(text: str) -> list[str]:
    """Words in NFC and case folded: runs of letters and digits, or one character of an unspaced script, or one sign."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def shingle_hashes(texts: Sequence[str], size: int) -> tuple[Hashes, Offsets]:
    """Each text's sorted unique hashes of its runs of `size` words, flat, and offsets (texts + 1).

    A shorter text is one shingle, a text without words has none.
    """
    parts, lengths = [], []
    for batch in batches(texts):
        grams, offsets = gram_hashes(*word_hashes(batch), size)
        unique, counts = _sorted_unique(grams, offsets)
        parts.append(unique)
        lengths.append(counts)
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(1, np.int64)
    return np.concatenate(parts), to_offsets(np.concatenate(lengths))


def batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Consecutive texts of together 2^18 characters or a little more, so that memory does not grow with the texts."""
    start, characters = 0, 0
    for end, text in enumerate(texts, start=1):
        characters += len(text) + 1
        if characters >= _BATCH_CHARACTERS:
            yield texts[start:end]
            start, characters = end, 0
    if start < len(texts):
        yield texts[start:]


def word_hashes(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    """The hash of every word of `words`, in order, flat over the texts, and offsets (texts + 1)."""
    if not texts:
        return np.zeros(0, np.uint64), np.zeros(1, np.int64)
    codes = _code_points(texts)
    firsts, lasts = _word_edges(_kinds()[codes])
    powers, inverses = _powers(1 << len(codes).bit_length())
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(_values()[codes] * powers[: len(codes)], out=sums[1:])
    hashes = mix((sums[lasts + 1] - sums[firsts]) * inverses[firsts])
    inner = np.searchsorted(firsts, np.flatnonzero(codes == ord(_BETWEEN_TEXTS)))
    return hashes, np.concatenate(([0], inner, [len(firsts)])).astype(np.int64)


def gram_hashes(hashes: Hashes, offsets: Offsets, size: int) -> tuple[Hashes, Offsets]:
    """The hash of every run of `size` words, in order; of all words where a text has fewer. Offsets as they came."""
    counts = np.diff(offsets)
    grams_per_text = np.where(counts > 0, np.maximum(counts - size + 1, 1), 0)
    grams_offsets = to_offsets(grams_per_text)
    starts = np.arange(grams_offsets[-1]) + np.repeat(offsets[:-1] - grams_offsets[:-1], grams_per_text)
    ends = np.repeat(offsets[1:], grams_per_text)
    padded = np.concatenate((hashes, np.zeros(size, np.uint64)))
    # Zero stands for "no word": no word hashes to it but by a chance of 2^-64.
    short = np.flatnonzero(starts + size > ends)
    total = np.zeros(len(starts), np.uint64)
    for place, factor in enumerate(_factors(size)):
        taken = padded[starts + place]
        taken[short[starts[short] + place >= ends[short]]] = 0
        total += taken * factor
    return mix(total), grams_offsets


def to_offsets(lengths: Offsets) -> Offsets:
    """Where each part of these lengths begins in a flat array, and where the last one ends (parts + 1)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def mix(values: Hashes) -> Hashes:
    """SplitMix64's finaliser, in place: a bijection after which every bit depends on every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


def _code_points(texts: Sequence[str]) -> NDArray[np.uint8] | NDArray[np.uint32]:
    """All texts normalised and joined; neither NFC nor case folding acts across the white space between them."""
    joined = _BETWEEN_TEXTS.join([text.replace(_BETWEEN_TEXTS, " ") for text in texts])
    folded = unicodedata.normalize("NFC", joined).casefold()
    if folded.isascii():
        return np.frombuffer(folded.encode("ascii"), np.uint8)
    return np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), np.uint32)


def _word_edges(kinds: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Positions of the first and of the last character of every word."""
    sign, letter = kinds == _SIGN, kinds == _LETTER
    first, last = letter.copy(), letter.copy()
    first[1:] &= ~letter[:-1]
    last[:-1] &= ~letter[1:]
    return np.flatnonzero(first | sign), np.flatnonzero(last | sign)


def _sorted_unique(flat: Hashes, offsets: Offsets) -> tuple[Hashes, Offsets]:
    """Each part sorted (in place) and without repetitions, and the new lengths."""
    edges = offsets.tolist()
    for start, end in pairwise(edges):
        flat[start:end].sort()
    new = np.ones(len(flat), np.bool_)
    new[1:] = flat[1:] != flat[:-1]
    new[offsets[:-1][np.diff(offsets) > 0]] = True
    kept_before = to_offsets(new.astype(np.int64))
    return flat[new], np.diff(kept_before[offsets])


@cache
def _kinds() -> NDArray[np.uint8]:
    """(code points,): what each character is, read off the pattern itself so that the two cannot differ."""
    every = "".join(map(chr, range(_CODE_POINTS)))
    kinds = np.full(_CODE_POINTS, _BLANK, np.uint8)
    for pattern, kind in ((re.compile(r"\S+"), _SIGN), (_LETTERS, _LETTER)):
        for run in pattern.finditer(every):
            kinds[run.start() : run.end()] = kind
    return kinds


@cache
def _values() -> Hashes:
    """(code points,): a pseudo-random number for each character."""
    return mix(np.arange(1, _CODE_POINTS + 1, dtype=np.uint64) * np.uint64(_BASE))


@lru_cache(maxsize=4)
def _powers(length: int) -> tuple[Hashes, Hashes]:
    """B^i and B^-i modulo 2^64 for i < length; B is odd and so has an inverse."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        powers = np.full(length, base, np.uint64)
        powers[0] = 1
        both.append(np.cumprod(powers))
    return both[0], both[1]


@cache
def _factors(size: int) -> Hashes:
    """(size,): an odd factor for each place in a run of words, so that their order counts."""
    return mix(np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_BASE) + np.uint64(1)) | np.uint64(1)
