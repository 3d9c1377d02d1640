"""The promotion ledger: who moved which champion, when, from, to, why, on what evidence; append-only, in one file.

Each line holds the sha256 of the line before, so a line that was changed or taken out is found. A move is written before the
alias is set, and again with its end, so that a move that a killed process left is known. What is lost when the file is, the
registry has as tags (tasks/release/history.py); anyone who can change both can change what happened.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_contracts.errors import Problem, StoreError, TransientError
from data_contracts.releases import Line, Move, MoveEntry, Step
from tasks.runtime.core.files import exclusive
from tasks.runtime.store import Store

LEDGER_FILE = "promotions.jsonl"
_WAIT_SECONDS = 60.0
_NOTHING = hashlib.sha256(b"").hexdigest()


@dataclass
class Ledger:
    """Every line of the file that can be trusted, as moves; last: sha256 of the newest line."""

    file: Path
    entries: dict[str, MoveEntry] = field(default_factory=dict)  # by the move's id
    last: str = _NOTHING
    problem: str | None = None  # the first line that is not what was written
    torn: bool = False  # its last line is not complete: a process is writing it, or was killed

    def of(self, name: str) -> list[MoveEntry]:
        """The moves of one model."""
        return [entry for entry in self.entries.values() if entry.move.name == name]

    @property
    def unfinished(self) -> list[Move]:
        return [entry.move for entry in self.entries.values() if entry.step == "intended"]

    def write(self, step: Step, move: Move, note: str = "", *, whole: bool = False) -> None:
        """Append a line, on the disk before this returns. whole: the move is in it, though it is not just intended."""
        line = Line(
            after=self.last, step=step, id=move.id, unix_seconds=time.time(), note=note,
            move=move if whole or step == "intended" else None,
        )  # fmt: skip
        raw = line.model_dump_json().encode()
        is_new = not self.file.exists()
        with self.file.open("ab") as file:
            file.write(raw + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            _keep_name(self.file.parent)
        self.last = _digest(raw)
        self.entries[move.id] = MoveEntry(move=move, step=step, note=note)


def read(store: Store) -> Ledger:
    """The ledger as it is now. A last line without its end is left out."""
    ledger = Ledger(store.files / LEDGER_FILE)
    lines = ledger.file.read_bytes().split(b"\n") if ledger.file.exists() else [b""]
    ledger.torn = bool(lines.pop())
    for number, raw in enumerate(lines, 1):
        try:
            _add(ledger, raw)
        except ValueError as error:
            ledger.problem = f"line {number}: {error}"
            break
        ledger.last = _digest(raw)
    return ledger


def _add(ledger: Ledger, raw: bytes) -> None:
    """Raises ValueError for a line that cannot follow the ones before."""
    try:
        line = Line.model_validate_json(raw)
    except ValueError as error:
        raise ValueError("it is no line of a promotion ledger") from error
    if line.after != ledger.last:
        raise ValueError("the line before it was changed or taken out")
    known = ledger.entries.get(line.id)
    move = line.move or (known.move if known else None)
    if move is None:
        raise ValueError("it ends a move that was never begun")
    ledger.entries[line.id] = MoveEntry(move=move, step=line.step, note=line.note)


@contextmanager
def opened(store: Store, wait_seconds: float = _WAIT_SECONDS) -> Iterator[Ledger]:
    """The ledger to write in, by one process at a time. The rest of a line that a killed one left is removed. Raises StoreError
    if a line is not what was written, TransientError if another process keeps holding it."""
    with locked(store, wait_seconds):
        ledger = read(store)
        if ledger.problem:
            raise StoreError(broken(ledger))
        if ledger.torn:
            _mend(ledger.file)
        yield ledger


@contextmanager
def locked(store: Store, wait_seconds: float = _WAIT_SECONDS) -> Iterator[None]:
    """One process at a time; the system opens the lock when its holder dies."""
    store.files.mkdir(parents=True, exist_ok=True)
    lock, limit = store.files / f"{LEDGER_FILE}.lock", f"{wait_seconds:g} s"
    busy = TransientError(Problem("another process is moving a champion", str(lock), limit, "try again"))
    with exclusive(lock, busy, seconds=wait_seconds):
        yield


def broken(ledger: Ledger, what: str | None = None) -> Problem:
    act = "restore the file from a backup, or rebuild it from the registry: tunegate history NAME --rebuild"
    return Problem(f"the promotion ledger was changed: {what or ledger.problem}", str(ledger.file), act=act)


def _mend(file: Path) -> None:
    raw = file.read_bytes()
    with file.open("r+b") as opened_file:
        opened_file.truncate(raw.rfind(b"\n") + 1)
        os.fsync(opened_file.fileno())


def _keep_name(folder: Path) -> None:
    """A new file's name is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def rewrite(store: Store, entries: list[MoveEntry], note: str) -> Path | None:
    """Replace the file by one of these moves; returns where the old one is kept. The caller holds the lock."""
    ledger = Ledger(store.files / LEDGER_FILE)
    kept = ledger.file.with_name(f"{LEDGER_FILE}.{time.time_ns()}") if ledger.file.exists() else None
    if kept:
        ledger.file.rename(kept)
    for entry in entries:
        ledger.write(entry.step, entry.move, note, whole=True)
    return kept


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
