"""Resolve copies: one row of a cluster stays, and nothing near a held-out row is trained on.

Rows that earlier batches have kept are anchors: they keep their place. A new row near an anchor is a duplicate of it
if the anchor trains; if it is held out, the row goes to quarantine; between two splits it goes there too.
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np

from tasks.data.curation.core.minhash import buckets, components
from tasks.data.curation.core.split import PRECEDENCE, Known, Split

_OUTSIDE: Final = len(PRECEDENCE)
Ints = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class CopyState(IntEnum):
    """What its copies leave of a row."""

    KEPT = 0
    DUPLICATE = 1
    NEAR_TEST = 2  # near a held-out row
    BRIDGES = 3  # near rows of two splits
    ABSENT = 4  # only known, not in the data now


class ComparedRows(NamedTuple):
    """Rows as columns: ids, what the ledger knows, whether the row is only known and not in the data now, and how
    bad a copy it is (lowest is best)."""

    ids: Sequence[str]
    known: Sequence[Known | None]
    absent: Mask
    badness: Ints


class Resolved(NamedTuple):
    """For each row its state, and the index of the row that it is a copy of or near to (else its own)."""

    states: "np.ndarray[Any, np.dtype[np.int8]]"
    originals: Ints


class _Change(NamedTuple):
    """A row that does not simply stay."""

    row: int
    state: CopyState
    original: int


def badness(flags: Ints, repairs: Ints, answer_chars: Ints) -> Ints:
    """One number a row, lowest for the copy to keep: fewest flags, then fewest repairs, then the longest answer."""
    return (flags << 40) + (repairs << 32) - np.minimum(answer_chars, 2**32 - 1)


def resolve_exact(keys: Ints, rows: ComparedRows) -> tuple[Resolved, ComparedRows]:
    """One row of every group with the same key stays; among the rows answered it has what is known of any copy."""
    changes: list[_Change] = []
    known = list(rows.known)
    for members in map(np.ndarray.tolist, buckets(keys)):
        present = [i for i in members if not rows.absent[i]]
        if not present:
            continue
        chosen = min(present, key=lambda i: _rank(rows, i))
        known[chosen] = rows.known[min(members, key=lambda i: _rank(rows, i))]
        states = ((i, CopyState.ABSENT if rows.absent[i] else CopyState.DUPLICATE) for i in members if i != chosen)
        changes += [_Change(i, state, chosen) for i, state in states]
    return _resolved(rows, changes), rows._replace(known=known)


def resolve_near(pairs: Ints, rows: ComparedRows) -> Resolved:
    """The states of rows of which `pairs` (n, 2) are near copies. Rows in no pair stay."""
    clusters = map(np.ndarray.tolist, buckets(components(len(rows.ids), pairs)))
    found = _resolved(rows, (change for members in clusters for change in _of_cluster(members, rows)))
    return _resolved(rows, _anchors_near_held_out(pairs, rows, found), found)


def _resolved(rows: ComparedRows, changes: Iterable[_Change], before: Resolved | None = None) -> Resolved:
    """All rows kept or absent, or as they were `before`, but for the changes."""
    start = before or Resolved(
        np.where(rows.absent, CopyState.ABSENT, CopyState.KEPT).astype(np.int8),
        np.arange(len(rows.ids), dtype=np.int64),
    )
    states, originals = start.states.copy(), start.originals.copy()
    for row, state, original in changes:
        states[row], originals[row] = state, original
    return Resolved(states, originals)


def _of_cluster(members: list[int], rows: ComparedRows) -> Iterator[_Change]:
    """The changes among rows that are near copies of each other, directly or through others."""
    anchors = [i for i in members if _is_anchor(rows, i)]
    others = [i for i in members if not _is_anchor(rows, i)]
    if not anchors:
        best = min(others, key=lambda i: _rank(rows, i))
        yield from (_Change(i, CopyState.DUPLICATE, best) for i in others if i != best)
        return
    nearest = min(anchors, key=lambda i: _rank(rows, i))
    splits = {_split(rows, i) for i in anchors}
    for index in others:
        if _split(rows, index) in splits or splits == {"train"}:
            twin = min((i for i in anchors if _split(rows, i) == _split(rows, index)), default=nearest)
            yield _Change(index, CopyState.DUPLICATE, twin)
        else:
            yield _Change(index, CopyState.BRIDGES if len(splits) > 1 else CopyState.NEAR_TEST, nearest)


def _anchors_near_held_out(pairs: Ints, rows: ComparedRows, found: Resolved) -> Iterator[_Change]:
    """Rows that train and are themselves a near copy of a held-out one: the first such pair of each."""
    left = set[int]()
    for a, b in pairs.tolist():
        first, second = rows.known[a], rows.known[b]
        if first and second and first.kept and second.kept and "train" in (first.split, second.split):
            train, other = (a, b) if first.split == "train" else (b, a)
            if rows.known[other] != rows.known[train] and found.states[train] == CopyState.KEPT and train not in left:
                left.add(train)
                yield _Change(train, CopyState.NEAR_TEST, other)


def _is_anchor(rows: ComparedRows, index: int) -> bool:
    known = rows.known[index]
    return bool(rows.absent[index] or (known and known.kept))


def _split(rows: ComparedRows, index: int) -> Split | None:
    known = rows.known[index]
    return known.split if known else None


def _rank(rows: ComparedRows, index: int) -> tuple[int, bool, int, str, int]:
    """Known rows first: held out before trained on, once kept before once a copy; then the best, then the smallest id."""
    known = rows.known[index]
    quality = int(rows.badness[index]), rows.ids[index], index
    if known is None:
        return _OUTSIDE, True, *quality
    return PRECEDENCE.index(known.split), not known.kept, *quality
