"""The append-only record of every row a model's data ever had: its fate, and the split it was first given."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Final, Literal, NamedTuple, cast

from data_contracts.errors import Problem, StoreError
from tasks.core.split import Known, Split
from tasks.stores import Store

Fate = Literal["kept", "quarantined", "duplicate"]

_WAIT_SECONDS: Final = 60.0  # another run may be writing
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS rows (
    scope TEXT NOT NULL,        -- the model the data belong to
    row_id TEXT NOT NULL,
    snapshot_id TEXT NOT NULL,
    fate TEXT NOT NULL,         -- kept, quarantined or duplicate
    reason TEXT,                -- of a quarantined row, or exact / near of a duplicate
    split TEXT,                 -- of a kept row, or of the row a duplicate is a copy of
    UNIQUE (scope, row_id, snapshot_id, fate)
)
"""


class Entry(NamedTuple):
    """What happened to one row of a snapshot."""

    row_id: str
    fate: Fate
    reason: str | None
    split: Split | None


def known_splits(store: Store, scope: str) -> dict[str, Known]:
    """For every row that was ever given a split, the first one. Duplicates have that of their original.

    Raises StoreError if the ledger cannot be read.
    """
    query = "SELECT row_id, split, fate FROM rows WHERE scope = ? AND split IS NOT NULL ORDER BY rowid"
    known: dict[str, Known] = {}
    with _connection(store) as connection:
        for row_id, split, fate in connection.execute(query, (scope,)):
            known.setdefault(row_id, Known(cast(Split, split), fate == "kept"))
    return known


def record(store: Store, scope: str, snapshot_id: str, entries: Iterable[Entry]) -> None:
    """Append the entries in one transaction; those already there are left as they are."""
    rows = ((scope, entry.row_id, snapshot_id, entry.fate, entry.reason, entry.split) for entry in entries)
    with _connection(store) as connection:
        connection.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?, ?, ?)", rows)


@contextmanager
def _connection(store: Store) -> Iterator[sqlite3.Connection]:
    """One transaction: committed if the block ends well."""
    store.files.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(store.ledger, timeout=_WAIT_SECONDS)) as connection, connection:
            connection.execute(_TABLE)
            yield connection
    except sqlite3.Error as error:
        act = "check that the disk has room and that no other program holds the file"
        raise StoreError(Problem(f"the row ledger failed: {error}", str(store.ledger), act=act)) from error
