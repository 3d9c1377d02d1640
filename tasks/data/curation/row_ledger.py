"""The append-only record of every row a model's data ever had: its fate, and the split it was first given.

Next to it: the texts of held-out rows, so that a copy that comes after the row itself has left is still known; the
batches in their order; and the rows a person has released from quarantine.
"""

import getpass
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, cast

from data_contracts.data_reports import FileRef
from data_contracts.errors import Problem, StoreError, TransientError
from data_contracts.retry_table import is_transient
from data_contracts.rows import Conversation, conversation_as_json, conversation_from_json
from tasks.data.curation.core.split import Known, Split
from tasks.runtime.core.files import exclusive
from tasks.runtime.store import Store

FateName = Literal["kept", "quarantined", "duplicate"]

_WAIT_SECONDS: Final = 60.0  # another run may be writing
_LOCK_SECONDS: Final = 3600.0  # another run may be splitting a million rows
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS rows (
    scope TEXT NOT NULL,        -- the model the data belong to
    row_id TEXT NOT NULL,
    snapshot_id TEXT NOT NULL,  -- the batch since which this is so
    fate TEXT NOT NULL,         -- kept, quarantined or duplicate
    reason TEXT,                -- of a quarantined row, or exact / near of a duplicate
    split TEXT                  -- of a kept row, or of the row a duplicate is a copy of
);
CREATE INDEX IF NOT EXISTS rows_by_id ON rows (scope, row_id);
CREATE TABLE IF NOT EXISTS held_out (
    scope TEXT NOT NULL, row_id TEXT NOT NULL, split TEXT NOT NULL, messages TEXT NOT NULL,
    PRIMARY KEY (scope, row_id)
);
CREATE TABLE IF NOT EXISTS clusters (
    scope TEXT NOT NULL,
    cluster TEXT NOT NULL,  -- a hash of the value of data.cluster_field
    split TEXT NOT NULL,
    PRIMARY KEY (scope, cluster)
);
CREATE TABLE IF NOT EXISTS batches (
    scope TEXT NOT NULL, snapshot_id TEXT NOT NULL, new_rows INTEGER NOT NULL, at REAL NOT NULL,
    profile_path TEXT NOT NULL, profile_sha256 TEXT NOT NULL,
    PRIMARY KEY (scope, snapshot_id)
);
CREATE TABLE IF NOT EXISTS releases (
    scope TEXT NOT NULL, row_id TEXT NOT NULL, reason TEXT NOT NULL, why TEXT NOT NULL, who TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (scope, row_id, reason)
);
"""


class LedgerEntry(NamedTuple):
    """The fate of one row of a snapshot."""

    row_id: str
    fate: FateName
    reason: str | None
    split: Split | None


class RowEvent(NamedTuple):
    """One line of a row's history."""

    snapshot_id: str
    fate: str
    reason: str | None
    split: str | None


class HeldOut(NamedTuple):
    row_id: str
    split: Split
    messages: Conversation


class Release(NamedTuple):
    row_id: str
    reason: str
    why: str
    who: str
    at: float  # seconds since 1970


@dataclass(frozen=True)
class CuratedBatch:
    """What curation learns from one snapshot. Of several entries of one id the first counts."""

    snapshot_id: str
    entries: Iterable[LedgerEntry]
    held_out: Iterable[HeldOut] = ()
    profile: FileRef | None = None  # None: the batch itself is not recorded
    clusters: Mapping[str, Split] = field(default_factory=dict)


def ledger_lock(store: Store) -> AbstractContextManager[None]:
    """Only one process splits and records at a time: what it read of the ledger stays true until it has written."""
    store.files.mkdir(parents=True, exist_ok=True)
    what = "another run has held the row ledger for an hour"
    busy = StoreError(Problem(what, str(store.ledger), act="wait for the other run, or end it"))
    return exclusive(store.ledger.with_name(f"{store.ledger.name}.lock"), busy, seconds=_LOCK_SECONDS)


def known_splits(store: Store, scope: str) -> dict[str, Known]:
    """For every row that was ever given a split, the first one. Duplicates have that of their original.

    Raises StoreError if the ledger cannot be read.
    """
    query = "SELECT row_id, split, fate FROM rows WHERE scope = ? AND split IS NOT NULL ORDER BY rowid"
    known: dict[str, Known] = {}
    values = {(split, kept): Known(split, kept) for split in ("train", "validation", "test") for kept in (True, False)}
    with connection(store) as database:
        for row_id, split, fate in database.execute(query, (scope,)):
            known.setdefault(row_id, values[split, fate == "kept"])  # shared: there may be millions
    return known


def known_clusters(store: Store, scope: str) -> dict[str, Split]:
    """The split of every cluster that ever had a row."""
    query = "SELECT cluster, split FROM clusters WHERE scope = ?"
    with connection(store) as database:
        return dict(database.execute(query, (scope,)))


def held_out(store: Store, scope: str) -> list[HeldOut]:
    """Every row that was ever held out, with its text, sorted by id."""
    query = "SELECT row_id, split, messages FROM held_out WHERE scope = ? ORDER BY row_id"
    with connection(store) as database:
        return [
            HeldOut(row_id, cast(Split, split), conversation_from_json(messages))
            for row_id, split, messages in database.execute(query, (scope,))
        ]


def record_batch(store: Store, scope: str, batch: CuratedBatch) -> int:
    """Append what is new or has changed, in one transaction; answer with how many rows were never seen before."""
    with connection(store) as database:
        query = "SELECT row_id, fate, reason, split FROM rows WHERE scope = ? ORDER BY rowid"
        latest = {row_id: tuple(state) for row_id, *state in database.execute(query, (scope,))}
        before, changed, seen = len(latest), [], set()
        for row_id, fate, reason, split in batch.entries:
            if row_id in seen:
                continue
            seen.add(row_id)
            if latest.get(row_id) != (fate, reason, split):
                changed.append((scope, row_id, batch.snapshot_id, fate, reason, split))
        new = len(seen - latest.keys()) if before else len(seen)
        database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", changed)
        texts = ((scope, row.row_id, row.split, conversation_as_json(row.messages)) for row in batch.held_out)
        database.executemany("INSERT OR IGNORE INTO held_out VALUES (?, ?, ?, ?)", texts)
        named = ((scope, cluster, split) for cluster, split in batch.clusters.items())
        database.executemany("INSERT OR REPLACE INTO clusters VALUES (?, ?, ?)", named)
        if batch.profile:
            values = (scope, batch.snapshot_id, new, time.time(), batch.profile.path, batch.profile.sha256)
            database.execute("INSERT OR IGNORE INTO batches VALUES (?, ?, ?, ?, ?, ?)", values)
    return new


def new_rows(store: Store, scope: str, snapshot_id: str) -> int | None:
    """How many rows of a snapshot were never seen before it; None before it was split."""
    query = "SELECT new_rows FROM batches WHERE scope = ? AND snapshot_id = ?"
    with connection(store) as database:
        found = database.execute(query, (scope, snapshot_id)).fetchone()
    return None if found is None else int(found[0])


def batch_before(store: Store, scope: str, snapshot_id: str) -> tuple[str, FileRef] | None:
    """Snapshot id and profile of the newest batch older than this one, or of the newest of all if this one is new."""
    query = "SELECT snapshot_id, profile_path, profile_sha256, at FROM batches WHERE scope = ? ORDER BY at"
    with connection(store) as database:
        batches = list(database.execute(query, (scope,)))
    mine = next((at for name, _, _, at in batches if name == snapshot_id), float("inf"))
    older = [(name, FileRef(path=path, sha256=sha256)) for name, path, sha256, at in batches if at < mine]
    return older[-1] if older else None


def row_history(store: Store, scope: str, row_id: str) -> list[RowEvent]:
    """All that ever happened to a row, oldest first."""
    query = "SELECT snapshot_id, fate, reason, split FROM rows WHERE scope = ? AND row_id = ? ORDER BY rowid"
    with connection(store) as database:
        return [RowEvent(*event) for event in database.execute(query, (scope, row_id))]


def release_rows(store: Store, scope: str, row_ids: Iterable[str], reason: str, why: str) -> None:
    """Overrule a reason for some rows, and remember who did and why."""
    rows = ((scope, row_id, reason, why, getpass.getuser(), time.time()) for row_id in row_ids)
    with connection(store) as database:
        database.executemany("INSERT OR IGNORE INTO releases VALUES (?, ?, ?, ?, ?, ?)", rows)


def releases(store: Store, scope: str) -> list[Release]:
    """Every release, sorted by row."""
    query = "SELECT row_id, reason, why, who, at FROM releases WHERE scope = ? ORDER BY row_id, reason"
    with connection(store) as database:
        return [Release(*row) for row in database.execute(query, (scope,))]


def fates_sha256(store: Store, scope: str, snapshot_id: str) -> str:
    """Hex sha256 of the fates that a batch has changed."""
    query = "SELECT row_id, fate, reason, split FROM rows WHERE scope = ? AND snapshot_id = ? ORDER BY row_id, rowid"
    found = hashlib.sha256()
    with connection(store) as database:
        for entry in database.execute(query, (scope, snapshot_id)):
            found.update(f"{json.dumps(entry)}\n".encode())
    return found.hexdigest()


def copy_before(store: Store, other: Store, scope: str, snapshot_id: str, released_before: float) -> None:
    """Give another store the ledger as it was when a batch was split first. released_before: seconds since 1970."""
    other.files.mkdir(parents=True, exist_ok=True)
    with connection(store) as now, closing(sqlite3.connect(other.ledger)) as copy:
        now.backup(copy)
    with connection(other) as database:
        first = "SELECT at FROM batches WHERE scope = ? AND snapshot_id = ?"
        for (at,) in database.execute(first, (scope, snapshot_id)).fetchall():
            database.execute("DELETE FROM batches WHERE scope = ? AND at >= ?", (scope, at))
        batches = "SELECT snapshot_id FROM batches WHERE scope = ?"
        database.execute(f"DELETE FROM rows WHERE scope = ? AND snapshot_id NOT IN ({batches})", (scope, scope))
        rows = "SELECT row_id FROM rows WHERE scope = ?"
        database.execute(f"DELETE FROM held_out WHERE scope = ? AND row_id NOT IN ({rows})", (scope, scope))
        database.execute("DELETE FROM releases WHERE scope = ? AND at >= ?", (scope, released_before))


@contextmanager
def connection(store: Store, tables: str = "") -> Iterator[sqlite3.Connection]:
    """One transaction: committed if the block ends well. `tables`: further ones, made if they are not there."""
    store.files.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(store.ledger, timeout=_WAIT_SECONDS)) as database, database:
            database.executescript(_TABLES + tables)
            yield database
    except sqlite3.Error as error:
        act = "check that the disk has room and that no other program holds the file"
        kind = TransientError if is_transient(error) else StoreError
        raise kind(Problem(f"the row ledger failed: {error}", str(store.ledger), act=act)) from error
