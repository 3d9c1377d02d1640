"""Run lock: one retrain at a time in a store. The second waits or gives way; the next start detects a crashed holder."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, Self

from data_contracts.errors import Problem, TransientError
from tasks.runtime.core.files import exclusive, write_atomically
from tasks.runtime.store import Store

_WITHOUT_LIMIT = -1.0  # seconds to wait, as filelock reads it


@dataclass(frozen=True)
class Holder:
    """The flow run that holds the lock, or held it until it was killed."""

    flow_run_id: str
    name: str
    host: str
    process: int
    since: str  # local time with its zone

    @classmethod
    def this_process(cls, flow_run_id: str, name: str) -> Self:
        return cls(flow_run_id, name, socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z"))

    def __str__(self) -> str:
        return f"{self.name} (process {self.process} on {self.host}) since {self.since}"


@dataclass(frozen=True)
class LockState:
    """acquired: whether the work may be done now. busy: the holder, if it is another. crashed: a killed holder before this."""

    acquired: bool
    busy: Holder | None = None
    crashed: Holder | None = None


@contextmanager
def hold_run_lock(
    store: Store, holder: Holder, when_busy: Literal["wait", "skip"], note: Callable[[str], None]
) -> Iterator[LockState]:
    """Hold the store's lock for the block. The system frees it the moment its holder dies, and the next one then finds the
    holder's name: a holder that exits normally removes it."""
    store.files.mkdir(parents=True, exist_ok=True)
    lock, name = store.files / "retrain.lock", store.files / "retrain.holder.json"
    taken = TransientError(Problem("another retrain is running", str(lock)))
    with ExitStack() as held:
        if not _entered(held, exclusive(lock, taken)):
            busy = _read(name)
            if when_busy == "skip":
                yield LockState(acquired=False, busy=busy)
                return
            note(f"waiting for {busy or 'another run'}")
            held.enter_context(exclusive(lock, taken, seconds=_WITHOUT_LIMIT))
        crashed = _read(name)
        held.callback(name.unlink, missing_ok=True)  # also after an error: only a kill leaves the name
        write_atomically(name, json.dumps(asdict(holder)))
        yield LockState(acquired=True, crashed=crashed)


def _entered(held: ExitStack, lock: AbstractContextManager[None]) -> bool:
    try:
        held.enter_context(lock)
    except TransientError:
        return False
    return True


def _read(file: "os.PathLike[str]") -> Holder | None:
    try:
        with open(file, encoding="utf-8") as text:
            return Holder(**json.load(text))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # none, or one of another format
