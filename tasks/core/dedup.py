"""Which rows say the same: exact copies after normalising, and near copies by Jaccard similarity.

Near copies are proposed by MinHash and locality-sensitive hashing and confirmed by the exact similarity, so a chance
collision of hashes never joins two rows. The result does not depend on the order of the rows.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Final

import numpy as np
from rensa import RMinHash

from data_contracts.records import Message

Conversation = tuple[Message, ...]

SHINGLE_WORDS: Final = 3
_PERMUTATIONS: Final = 128
_SEED: Final = 17
_BATCH_ROWS: Final = 20_000
_FACT_WORDS: Final = 4
_FACT_ROWS: Final = 10
_MISSED_AT_THRESHOLD: Final = 0.01  # share of pairs exactly at the threshold that hashing may overlook

# A word, or one character of a script that is written without spaces, or one sign.
_WORD: Final = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]"
)


def normalise(text: str) -> str:
    """NFC, case folded, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def exact_groups(conversations: Sequence[Conversation]) -> list[int]:
    """For each row the index of the first row with the same normalised roles and texts."""
    first: dict[tuple[tuple[str, str], ...], int] = {}
    keys = (tuple((role, normalise(content)) for role, content in messages) for messages in conversations)
    return [first.setdefault(key, index) for index, key in enumerate(keys)]


def near_groups(conversations: Sequence[Conversation], threshold: float) -> list[int]:
    """For each row the smallest index of its cluster: rows linked by pairs with Jaccard similarity >= threshold.

    The whole text must be that similar and so must the answer alone: otherwise a long passage would swallow the
    short questions asked about it. At threshold 1 every row is its own cluster: exact copies are not sought here.
    """
    texts = [" ".join(normalise(message.content) for message in messages) for messages in conversations]
    parents = list(range(len(texts)))
    if threshold >= 1.0 or len(texts) < 2:
        return parents

    @lru_cache(maxsize=50_000)
    def shingle_sets(index: int) -> tuple[frozenset[str], frozenset[str]]:
        answer = normalise(conversations[index][-1].content)
        return frozenset(shingles(texts[index])), frozenset(shingles(answer))

    def similar(a: int, b: int) -> bool:
        return all(jaccard(x, y) >= threshold for x, y in zip(shingle_sets(a), shingle_sets(b), strict=True))

    for bucket in _buckets(texts, threshold):
        _join_similar(bucket, parents, similar)
    return [_root(parents, index) for index in range(len(texts))]


def answer_groups(row_ids: Sequence[str], conversations: Sequence[Conversation]) -> dict[str, str]:
    """What each row teaches, by row id: its normalised answer, or the row itself where the answer is no fact.

    The same answer to two questions (a function and its alias, a fact asked in two ways) is seen in training if only
    one of the two is held out. Answers of few words are labels and very frequent ones boilerplate: knowing them is no
    leak, and keeping all their rows together would leave splits without them.
    """
    answers = [normalise(messages[-1].content) for messages in conversations]
    counts = Counter(answers)
    facts = (len(_WORD.findall(answer)) >= _FACT_WORDS and counts[answer] <= _FACT_ROWS for answer in answers)
    return {row_id: answer if fact else row_id for row_id, answer, fact in zip(row_ids, answers, facts, strict=True)}


def shingles(text: str) -> list[str]:
    """Runs of three words; a shorter text is one shingle."""
    words = _WORD.findall(text)
    if len(words) <= SHINGLE_WORDS:
        return [" ".join(words)]
    return [" ".join(gram) for gram in zip(words, words[1:], words[2:], strict=False)]


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over size of the union, in [0, 1]; 1.0 for two empty sets."""
    common = len(a & b)
    union = len(a) + len(b) - common
    return common / union if union else 1.0


def _buckets(texts: Sequence[str], threshold: float) -> Iterator[list[int]]:
    """Groups of rows that agree on one band of their MinHash digest."""
    rows_per_band = _rows_per_band(threshold)
    signatures = _signatures(texts)
    factors = np.random.default_rng(_SEED).integers(1, 2**63, size=rows_per_band, dtype=np.uint64)
    for start in range(0, _PERMUTATIONS - rows_per_band + 1, rows_per_band):
        # Two bands with one key by chance only propose a pair more.
        keys = (signatures[:, start : start + rows_per_band] * factors).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        edges = np.concatenate(([0], np.flatnonzero(np.diff(keys[order])) + 1, [len(keys)]))
        for run in np.flatnonzero(np.diff(edges) > 1):
            yield order[edges[run] : edges[run + 1]].tolist()


def _rows_per_band(threshold: float) -> int:
    """The most selective banding that still finds 99 % of the pairs at the threshold: miss = (1 - t^r)^(n/r)."""
    for rows in range(16, 1, -1):
        if (1 - threshold**rows) ** (_PERMUTATIONS // rows) <= _MISSED_AT_THRESHOLD:
            return rows
    return 1


def _signatures(texts: Sequence[str]) -> "np.ndarray[tuple[int, int], np.dtype[np.uint32]]":
    """(rows, permutations) of MinHash values, made in batches to bound the memory that shingles take."""
    pending = iter(texts)
    parts = []
    while batch := list(islice(pending, _BATCH_ROWS)):
        digests = RMinHash.digests_from_token_sets([shingles(text) for text in batch], _PERMUTATIONS, _SEED)
        parts.append(np.asarray(digests, dtype=np.uint32))
    return np.concatenate(parts)


def _join_similar(bucket: list[int], parents: list[int], similar: Callable[[int, int], bool]) -> None:
    """Union-find over a bucket. Pairs in one cluster already are passed over: they cannot change the clusters."""
    clusters: dict[int, list[int]] = {}
    for index in bucket:
        for root in list(clusters):
            members = clusters[root]
            mine = _root(parents, index)
            if _root(parents, root) != mine and any(similar(index, member) for member in members):
                low, high = sorted((_root(parents, root), mine))
                parents[high] = low
        clusters.setdefault(_root(parents, index), []).append(index)


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index
