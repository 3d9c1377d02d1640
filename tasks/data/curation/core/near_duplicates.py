"""What becomes of near copies: one row of a cluster stays, and nothing near a held-out row is trained on.

Rows that earlier batches have kept are anchors: they keep their place. A new row near an anchor is a duplicate of it
if the anchor trains; if it is held out, the row goes to quarantine; between two splits it goes there too.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from tasks.data.curation.core.minhash import buckets, components
from tasks.data.curation.core.split import PRECEDENCE, Known

KEPT, DUPLICATE, NEAR_TEST, BRIDGES, ABSENT = range(5)
_OUTSIDE: Final = len(PRECEDENCE)
Ints = np.ndarray[Any, np.dtype[np.int64]]


class Rows(NamedTuple):
    """Rows side by side: ids, what the ledger knows, whether the row is only known and not in the data now, and how
    bad a copy it is (lowest is best)."""

    ids: Sequence[str]
    known: list[Known | None]
    absent: "np.ndarray[Any, np.dtype[np.bool_]]"
    badness: Ints

    def take(self, places: Ints) -> "Rows":
        chosen = places.tolist()
        known = [self.known[i] for i in chosen]
        return Rows([self.ids[i] for i in chosen], known, self.absent[places], self.badness[places])


class Fates(NamedTuple):
    """For each row what becomes of it, and the index of the row it is a copy of or lies near to (else its own)."""

    codes: "np.ndarray[Any, np.dtype[np.int8]]"
    of: Ints

    def set(self, index: int, code: int, of: int) -> None:
        self.codes[index], self.of[index] = code, of


def badness(flags: Ints, repairs: Ints, answer_chars: Ints) -> Ints:
    """One number a row, lowest for the copy to keep: fewest flags, then fewest repairs, then the longest answer."""
    return (flags << 40) + (repairs << 32) - np.minimum(answer_chars, 2**32 - 1)


def settle_exact(keys: Ints, rows: Rows) -> Fates:
    """One row of every group with the same key stays; it inherits in `rows.known` what is known of any copy."""
    fates = _all_kept(rows)
    for members in map(np.ndarray.tolist, buckets(keys)):
        present = [i for i in members if not rows.absent[i]]
        if not present:
            continue
        best = min(members, key=lambda i: _rank(rows, i))
        chosen = min(present, key=lambda i: _rank(rows, i))
        rows.known[chosen] = rows.known[best]
        for index in members:
            if index != chosen:
                fates.set(index, ABSENT if rows.absent[index] else DUPLICATE, chosen)
    return fates


def settle_near(pairs: Ints, rows: Rows) -> Fates:
    """Fates of rows that are distinct but for `pairs` (n, 2) of near copies."""
    fates = _all_kept(rows)
    for members in map(np.ndarray.tolist, buckets(components(len(rows.ids), pairs))):
        _settle(members, rows, fates)
    for a, b in pairs.tolist():
        first, second = rows.known[a], rows.known[b]
        if first and second and first.kept and second.kept and "train" in (first.split, second.split):
            train, other = (a, b) if first.split == "train" else (b, a)
            if rows.known[other] != rows.known[train] and fates.codes[train] == KEPT:
                fates.set(train, NEAR_TEST, other)
    return fates


def _settle(members: list[int], rows: Rows, fates: Fates) -> None:
    anchors = [i for i in members if _is_anchor(rows, i)]
    others = [i for i in members if not _is_anchor(rows, i)]
    if not anchors:
        chosen = min(others, key=lambda i: _rank(rows, i))
        for index in others:
            if index != chosen:
                fates.set(index, DUPLICATE, chosen)
        return
    nearest = min(anchors, key=lambda i: _rank(rows, i))
    splits = {_split(rows, i) for i in anchors}
    for index in others:
        if _split(rows, index) in splits or splits == {"train"}:
            twin = min((i for i in anchors if _split(rows, i) == _split(rows, index)), default=nearest)
            fates.set(index, DUPLICATE, twin)
        else:
            fates.set(index, BRIDGES if len(splits) > 1 else NEAR_TEST, nearest)


def _is_anchor(rows: Rows, index: int) -> bool:
    known = rows.known[index]
    return bool(rows.absent[index] or (known and known.kept))


def _split(rows: Rows, index: int) -> str | None:
    known = rows.known[index]
    return known.split if known else None


def _rank(rows: Rows, index: int) -> tuple[int, bool, int, str, int]:
    """Known rows first: held out before trained on, once kept before once a copy; then the best, then the smallest id."""
    known = rows.known[index]
    quality = int(rows.badness[index]), rows.ids[index], index
    if known is None:
        return _OUTSIDE, True, *quality
    return PRECEDENCE.index(known.split), not known.kept, *quality


def _all_kept(rows: Rows) -> Fates:
    codes = np.where(rows.absent, ABSENT, KEPT).astype(np.int8)
    return Fates(codes, np.arange(len(rows.ids), dtype=np.int64))
