"""How far finished runs have got with the data, and what each check since then found. Kept in the row ledger's file."""

import json
import time
from collections.abc import Iterable
from typing import Final, NamedTuple

from data_contracts.data_reports import FileRef, SourceCheck
from tasks.data.curation.row_ledger import connection
from tasks.runtime.store import Store

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS finished (
    scope TEXT NOT NULL, snapshot_id TEXT NOT NULL, run_id TEXT NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS looks (
    scope TEXT NOT NULL, snapshot_id TEXT NOT NULL, new_rows INTEGER NOT NULL, known_rows INTEGER NOT NULL,
    drift TEXT NOT NULL, drifted TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (scope, snapshot_id)
);
"""
# The rows of every batch up to the newest one that a run has finished on: a run takes all rows there are.
_KNOWN: Final = """
rows WHERE scope = :scope AND snapshot_id IN (
    SELECT snapshot_id FROM batches WHERE scope = :scope AND at <= (
        SELECT MAX(batches.at) FROM batches JOIN finished USING (scope, snapshot_id) WHERE scope = :scope
    )
)
"""


class Finished(NamedTuple):
    snapshot_id: str
    run_id: str
    profile: FileRef


def finish(store: Store, scope: str, snapshot_id: str, run_id: str) -> None:
    """A run has ended on this snapshot, whatever its verdict: these rows are no news any more.

    A run that found everything done before leaves no second entry.
    """
    last = last_finished(store, scope)
    if last and last.snapshot_id == snapshot_id:
        return
    with connection(store, _TABLES) as database:
        database.execute("INSERT INTO finished VALUES (?, ?, ?, ?)", (scope, snapshot_id, run_id, time.time()))


def last_finished(store: Store, scope: str) -> Finished | None:
    """The newest finished run, with the profile of its rows."""
    query = """SELECT snapshot_id, run_id, profile_path, profile_sha256 FROM finished
               JOIN batches USING (scope, snapshot_id) WHERE scope = ? ORDER BY finished.at DESC LIMIT 1"""
    with connection(store, _TABLES) as database:
        found = database.execute(query, (scope,)).fetchone()
    return Finished(found[0], found[1], FileRef(path=found[2], sha256=found[3])) if found else None


def known_rows(store: Store, scope: str) -> set[str]:
    """Ids of all rows that a finished run has had before it, also those that have left the data since."""
    with connection(store, _TABLES) as database:
        found = database.execute(f"SELECT DISTINCT row_id FROM {_KNOWN}", {"scope": scope})
        return {row_id for (row_id,) in found}


def count_known_rows(store: Store, scope: str) -> int:
    """How many `known_rows` has, without holding them."""
    with connection(store, _TABLES) as database:
        return int(database.execute(f"SELECT COUNT(DISTINCT row_id) FROM {_KNOWN}", {"scope": scope}).fetchone()[0])


def keep_check(store: Store, scope: str, found: SourceCheck) -> None:
    """Keep what a check of the sources found; the same snapshot counts once, however often it is checked."""
    distances = (json.dumps(found.drift), json.dumps(found.drifted))
    values = (found.snapshot_id, found.new_rows, found.known_rows, *distances)
    with connection(store, _TABLES) as database:
        database.execute("INSERT OR IGNORE INTO looks VALUES (?, ?, ?, ?, ?, ?, ?)", (scope, *values, time.time()))


def drifted_checks(store: Store, scope: str) -> list[bool]:
    """For every check that found new rows, oldest first: had they drifted?"""
    query = "SELECT drifted FROM looks WHERE scope = ? AND new_rows > 0 ORDER BY at"
    with connection(store, _TABLES) as database:
        found: Iterable[tuple[str]] = database.execute(query, (scope,))
        return [bool(json.loads(drifted)) for (drifted,) in found]
