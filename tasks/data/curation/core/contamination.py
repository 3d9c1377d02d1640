"""Does a training row hold most of an item that will be measured? Tulu 3 (arXiv 2411.15124): 8-grams, more than half.

Memory is proportional to the items; training rows stream by twice.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.data.curation.core.shingles import Hashes, batches, gram_hashes, word_hashes

_OLD_GRAM: Final = 13  # GPT-3's rule (arXiv 2005.14165): any shared 13-gram


class Hit(NamedTuple):
    """Training row `row` holds `share` of the words of item `item` in shared n-grams."""

    row: int
    item: int
    share: float


class SharedItems(NamedTuple):
    hits: list[Hit]
    any_shared: list[int]  # rows that share any 13-gram with any item


class Detector:
    """Compares training rows with items: first `count` all rows, then `check` them.

    An n-gram that stands in more than `common` training rows is template text and no evidence: near copies have left
    the rows before. An item with fewer than `n` words cannot be checked (`too_short` counts them): the search for near
    copies covers it.
    """

    def __init__(self, items: Sequence[str], n: int = 8, share: float = 0.5, common: int = 10) -> None:
        self._n, self._share, self._common = n, share, common
        self._items: list[Hashes] = []
        self._words: list[int] = []
        old: list[Hashes] = [np.zeros(0, np.uint64)]
        for batch in batches(items):
            hashes, offsets = word_hashes(batch)
            grams, edges = gram_hashes(hashes, offsets, n)
            self._items += [grams[edges[i] : edges[i + 1]] for i in range(len(batch))]
            self._words += np.diff(offsets).tolist()
            long = [i for i in range(len(batch)) if offsets[i + 1] - offsets[i] >= _OLD_GRAM]
            wide, ends = gram_hashes(hashes, offsets, _OLD_GRAM)
            old += [wide[ends[i] : ends[i + 1]] for i in long]
        self._items = [g if w >= n else g[:0] for g, w in zip(self._items, self._words, strict=True)]
        self.too_short = sum(words < n for words in self._words)
        self._grams = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._items]))
        self._old = np.unique(np.concatenate(old))
        self._frequency = np.zeros(len(self._grams), np.int64)
        self._holders: dict[int, list[int]] = {}
        for item, grams in enumerate(self._items):
            for gram in np.unique(np.searchsorted(self._grams, grams)).tolist():
                self._holders.setdefault(gram, []).append(item)

    def count(self, texts: Sequence[str]) -> None:
        """First pass: in how many rows each n-gram of an item stands."""
        for batch in batches(texts):
            for grams in self._shared(batch).values():
                self._frequency[grams] += 1

    def check(self, texts: Sequence[str]) -> SharedItems:
        """Second pass: hits by place in `texts`, the fullest item of each row first."""
        hits, old, start = [], [], 0
        for batch in batches(texts):
            shared = self._shared(batch)
            for row, grams in shared.items():
                rare = grams[self._frequency[grams] <= self._common]
                hits += self._hits(start + row, rare)
            # Who shares a longer run shares a shorter one: few rows are left to search.
            rows = list(shared) if self._n <= _OLD_GRAM else list(range(len(batch)))
            old += [start + rows[place] for place in self._old_rows([batch[row] for row in rows])]
            start += len(batch)
        return SharedItems(sorted(hits, key=lambda hit: (hit.row, -hit.share, hit.item)), old)

    def _hits(self, row: int, grams: NDArray[np.int64]) -> list[Hit]:
        found = []
        for item in sorted({item for gram in grams.tolist() for item in self._holders[gram]}):
            starts = np.flatnonzero(np.isin(self._items[item], self._grams[grams]))
            covered = np.zeros(self._words[item], np.bool_)
            for start in starts.tolist():
                covered[start : start + self._n] = True
            if covered.mean() > self._share:
                found.append(Hit(row, item, float(covered.mean())))
        return found

    def _shared(self, batch: Sequence[str]) -> dict[int, NDArray[np.int64]]:
        """For each row that has some, the places in `_grams` of the n-grams it shares with items."""
        grams, offsets = gram_hashes(*word_hashes(batch), self._n)
        same, places = _found(grams, self._grams)
        rows, starts = np.unique(np.searchsorted(offsets, same, side="right") - 1, return_index=True)
        parts = np.split(places, starts[1:])
        return {int(row): np.unique(part) for row, part in zip(rows, parts, strict=True)} if len(rows) else {}

    def _old_rows(self, texts: Sequence[str]) -> list[int]:
        """The texts that share a 13-gram with an item; one of fewer words is no 13-gram."""
        hashes, offsets = word_hashes(texts)
        grams, edges = gram_hashes(hashes, offsets, _OLD_GRAM)
        rows = np.unique(np.searchsorted(edges, _found(grams, self._old)[0], side="right") - 1)
        return [int(row) for row in rows if offsets[row + 1] - offsets[row] >= _OLD_GRAM]


def _found(grams: Hashes, known: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where in `grams` something known stands, and its place in `known`, which is sorted: it is not sorted again."""
    if not len(known):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    places = np.searchsorted(known, grams)
    places[places == len(known)] = 0
    same = np.flatnonzero(known[places] == grams)
    return same, places[same]
