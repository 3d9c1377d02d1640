"""The compared columns, and the representative row of each group of copies.

A row has one place throughout: first come the rows of the data, in the order of their parts, then the held-out rows that
only the ledger knows. Everything about rows is a column by place.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.data_reports import ValidatedData
from tasks.data.curation.core.minhash import near_pairs, similar
from tasks.data.curation.core.near_duplicates import (
    ComparedRows,
    CopyState,
    Ints,
    Mask,
    badness,
    resolve_exact,
    resolve_near,
)
from tasks.data.curation.core.split import Known, Split
from tasks.data.curation.row_ledger import HeldOut
from tasks.data.curation.signatures import Shingling, Signatures, SignPart, sign, sign_part
from tasks.runtime.fingerprint import code_digest, library_versions
from tasks.runtime.partitions import Part, map_parts
from tasks.runtime.store import Store, content_key

_QUALITY: Final = ("flags", "repairs", "completion_chars")  # what `badness` takes


class Earlier(NamedTuple):
    """What the ledger holds of earlier batches."""

    known: dict[str, Known]  # by row id
    held_out: list[HeldOut]
    clusters: dict[str, Split]


class ComparedData(NamedTuple):
    """All rows by place: those of the data, then held-out rows that have left them."""

    rows: ComparedRows
    signatures: Signatures
    clusters: list[str | None]  # of the rows of the data, by the user's own field

    @property
    def ids(self) -> Sequence[str]:
        """Of the rows of the data."""
        return self.rows.ids[: len(self.clusters)]


def sign_parts(store: Store, validated: ValidatedData, shingling: Shingling, engine: str) -> list[Path]:
    """Sign every part of the checked rows that has not been signed before; answer with their folders."""
    made_by = (code_digest(("tasks.data.curation.signatures",)), json.dumps([shingling, library_versions(("rensa",))]))
    work = [
        Part(content_key(ref.sha256, *made_by)[:32], SignPart(store.path(ref).resolve(), shingling))
        for ref in validated.kept
    ]
    return map_parts(store, "signed", sign_part, work, engine)


def load_compared(
    parts: list[Path], signed: list[Path], earlier: Earlier, shingling: Shingling, scratch: Path
) -> ComparedData:
    """Read what is compared; the held-out rows that have left the data are signed in `scratch`."""
    facts = pa.concat_tables(pq.read_table(part, columns=["row_id", "cluster", *_QUALITY]) for part in parts)
    ids = facts["row_id"].to_pylist()
    here = set(ids)
    gone = [row for row in earlier.held_out if row.row_id not in here]
    sign([row.messages for row in gone], shingling, scratch)
    every = [*ids, *(row.row_id for row in gone)]
    absent = np.arange(len(every)) >= len(ids)
    worse = np.concatenate([badness(*(facts[name].to_numpy() for name in _QUALITY)), np.zeros(len(gone), np.int64)])
    rows = ComparedRows(every, [earlier.known.get(i) for i in every], absent, worse)
    return ComparedData(rows, Signatures([*signed, scratch]), facts["cluster"].to_pylist())


class RowCopies(NamedTuple):
    """By place, for all rows: which row stands for them.

    firsts: the row that each is an exact copy of (else its own place). states: what near copies leave of that one.
    originals: the row that it is near to (else the first itself). known: as the ledger has it, for any exact copy.
    """

    firsts: Ints
    states: "np.ndarray[Any, np.dtype[np.int8]]"
    originals: Ints
    known: Sequence[Known | None]

    @property
    def distinct(self) -> Mask:
        """Rows that are no exact copy of another."""
        return np.equal(self.firsts, np.arange(len(self.firsts)))

    def places(self, state: CopyState) -> list[int]:
        """The distinct rows in this state."""
        found: list[int] = np.flatnonzero(self.distinct & (self.states == state)).tolist()
        return found


def resolve_copies(data: ComparedData, threshold: float) -> RowCopies:
    """Exact copies first, then near copies among the rows that are left. threshold: of Jaccard similarity."""
    exact, rows = resolve_exact(data.signatures.content_hashes, data.rows)
    firsts = exact.originals
    distinct = np.flatnonzero(firsts == np.arange(len(firsts)))
    near = resolve_near(_near_pairs(data.signatures, distinct, threshold), rows)
    return RowCopies(firsts, near.states[firsts], near.originals[firsts], rows.known)


def _near_pairs(signatures: Signatures, places: Ints, threshold: float) -> Ints:
    """(pairs, 2): those of `places` whose texts and whose answers are near copies."""
    if threshold >= 1.0 or len(places) < 2:
        return np.zeros((0, 2), np.int64)
    pairs = near_pairs(signatures.bands[places], lambda rows: signatures.text_shingles(places[rows]), threshold)
    # A long passage would swallow the short questions asked about it: the answers must be near as well.
    pairs = pairs[similar(pairs, lambda rows: signatures.answer_shingles(places[rows]), threshold)]
    found: Ints = places[pairs]
    return found
