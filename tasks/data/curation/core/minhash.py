"""Near copies among a million texts: MinHash proposes pairs, the exact Jaccard similarity of their shingles decides.

Broder 1997 (doi:10.1109/SEQUEN.1997.666900); banding: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3.
Results do not depend on the order of the rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from tasks.data.curation.core.shingles import Hashes, Offsets, mix

_PERMUTATIONS: Final = 128
_SEED: Final = 17
_MISSED_AT_THRESHOLD: Final = 0.02  # share of pairs exactly at the threshold that hashing may overlook
_HOT_ROWS: Final = 200  # rows of a bucket from which it is boilerplate they share
_BATCH_PAIRS: Final = 100_000
Fetch = Callable[[NDArray[np.int64]], tuple[Hashes, Offsets]]


def signatures(flat: Hashes, offsets: Offsets, threshold: float) -> Hashes:
    """(rows, bands) keys from the shingles of texts: rows that share one are candidates. No shingles: keys of its own."""
    width = _rows_per_band(threshold)
    bands = _PERMUTATIONS // width
    if len(offsets) < 2:
        return np.zeros((0, bands), np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets.astype(np.uint64), _PERMUTATIONS, _SEED)
    digests = np.asarray(matrix.to_rows(), np.uint64)[:, : bands * width].reshape(-1, bands, width)
    factors = np.random.default_rng(_SEED).integers(1, 2**63, size=width, dtype=np.uint64) | np.uint64(1)
    keys: Hashes = (digests * factors).sum(axis=2, dtype=np.uint64)
    return keys


def near_pairs(bands: Hashes, fetch: Fetch, threshold: float) -> NDArray[np.int64]:
    """(pairs, 2): all candidate pairs whose Jaccard similarity reaches the threshold, smaller index first, sorted.

    `fetch` gives the shingles of some rows, so that only those of candidates are loaded. A row without shingles is
    near to none.
    """
    rows = len(bands)
    kept: list[NDArray[np.int64]] = []
    seen = np.zeros(0, np.int64)
    for candidates in _candidates(bands):
        new = np.setdiff1d(np.unique(candidates), seen, assume_unique=True)
        seen = np.union1d(seen, new)
        pairs = np.stack((new // rows, new % rows), axis=1)
        kept.append(pairs[similar(pairs, fetch, threshold)])
    found = np.concatenate([np.zeros((0, 2), np.int64), *kept])
    return found[np.lexsort((found[:, 1], found[:, 0]))]


def similar(pairs: NDArray[np.int64], fetch: Fetch, threshold: float) -> NDArray[np.bool_]:
    """(pairs,): whether each pair's Jaccard similarity reaches the threshold."""
    parts = [_jaccard(pairs[i : i + _BATCH_PAIRS], fetch) >= threshold for i in range(0, len(pairs), _BATCH_PAIRS)]
    return np.concatenate([np.zeros(0, np.bool_), *parts])


def components(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """(count,): the smallest index of each row's connected component."""
    ones = np.ones(len(pairs), np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    smallest = np.full(count, count, np.int64)
    np.minimum.at(smallest, labels, np.arange(count))
    found: NDArray[np.int64] = smallest[labels]
    return found


def _rows_per_band(threshold: float) -> int:
    """The most selective banding that still finds 98 % of the pairs at the threshold: miss = (1 - t^r)^(n/r)."""
    for rows in range(16, 1, -1):
        if (1 - threshold**rows) ** (_PERMUTATIONS // rows) <= _MISSED_AT_THRESHOLD:
            return rows
    return 1


def _jaccard(pairs: NDArray[np.int64], fetch: Fetch) -> NDArray[np.float64]:
    rows, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(pairs.shape)
    flat, offsets = fetch(rows)
    sizes = np.diff(offsets)
    # Columns by rank: sparse arrays index with 64-bit integers, hashes are unsigned.
    columns = np.unique(flat, return_inverse=True)[1]
    matrix = csr_array((np.ones(len(flat), np.int32), columns, offsets), shape=(len(rows), max(1, len(flat))))
    common = matrix[places[:, 0]].multiply(matrix[places[:, 1]]).sum(axis=1)
    union = sizes[places[:, 0]] + sizes[places[:, 1]] - common
    return np.where(union > 0, common / np.maximum(union, 1), 0.0)


def _candidates(bands: Hashes) -> Iterator[NDArray[np.int64]]:
    """Pairs as `smaller * rows + larger`, band by band; a hot bucket is split by agreement in a second band."""
    for band in range(bands.shape[1]):
        pairs = []
        for bucket in buckets(bands[:, band]):
            if len(bucket) <= _HOT_ROWS:
                pairs.append(_all_pairs(bucket, len(bands)))
            else:
                pairs += _split_hot(bucket, bands, band)
        if pairs:
            yield np.concatenate(pairs)


def _split_hot(bucket: NDArray[np.int64], bands: Hashes, band: int) -> list[NDArray[np.int64]]:
    """Pairs that agree in a second band too; of what is still hot (copies of one text) a chain and a star."""
    pairs = []
    content = mix(bands[bucket] * np.arange(1, 2 * bands.shape[1], 2, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    for other in range(bands.shape[1]):
        if other == band:
            continue
        for places in buckets(bands[bucket, other]):
            rows = bucket[places]
            if len(rows) <= _HOT_ROWS:
                pairs.append(_all_pairs(rows, len(bands)))
                continue
            # Ordered by what they say, not by where they stand; next to each other if they agree in a third band.
            rows = rows[np.lexsort((content[places], bands[rows, (other + 1) % bands.shape[1]]))]
            for first, second in ((rows[:-1], rows[1:]), (rows[:1], rows[1:])):
                pairs.append(np.minimum(first, second) * len(bands) + np.maximum(first, second))
    return pairs


def _all_pairs(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    first, second = np.triu_indices(len(rows), 1)
    found: NDArray[np.int64] = rows[first] * count + rows[second]
    return found


def buckets(keys: Any) -> list[NDArray[np.int64]]:
    """The indices that share a key with others, ascending, group by group."""
    order = np.argsort(keys, kind="stable")
    edges = np.concatenate(([0], np.flatnonzero(np.diff(keys[order])) + 1, [len(keys)]))
    return [order[edges[i] : edges[i + 1]] for i in np.flatnonzero(np.diff(edges) > 1)]
