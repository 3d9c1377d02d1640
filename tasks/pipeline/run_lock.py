"""One retrain at a time in a store: the second waits or ends as Skipped, and a dead one is found out at the next start."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

from filelock import FileLock, Timeout

from tasks.runtime.store import Store


@dataclass(frozen=True)
class Holder:
    """Who works, or worked until it was killed."""

    flow_run_id: str
    name: str
    host: str
    process: int
    since: str  # local time with its zone

    def __str__(self) -> str:
        return f"{self.name} (process {self.process} on {self.host}) since {self.since}"


def me(flow_run_id: str, name: str) -> Holder:
    return Holder(flow_run_id, name, socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z"))


@dataclass(frozen=True)
class Turn:
    """mine: whether the work may be done now. other: who does it instead, or who died at it."""

    mine: bool
    other: Holder | None


@contextmanager
def turn(
    store: Store, holder: Holder, when_busy: Literal["wait", "skip"], note: Callable[[str], None]
) -> Iterator[Turn]:
    """Hold the store's lock for the block. The system frees it the moment its holder dies, and then it is known who did:
    a holder that ends well takes its name away.

    On a shared volume this holds between machines only if the volume keeps POSIX locks (NFS 4 does).
    """
    store.files.mkdir(parents=True, exist_ok=True)
    lock = FileLock(store.files / "retrain.lock")
    name = store.files / "retrain.holder.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy = _read(name)
        if when_busy == "skip":
            yield Turn(False, busy)
            return
        note(f"waiting for {busy or 'another run'}")
        lock.acquire(poll_interval=0.5)
    try:
        dead = _read(name)
        name.write_text(json.dumps(asdict(holder)), encoding="utf-8")
        yield Turn(True, dead)
    finally:
        name.unlink(missing_ok=True)  # also after an error: only a kill leaves the name
        lock.release()


def _read(file: "os.PathLike[str]") -> Holder | None:
    try:
        with open(file, encoding="utf-8") as text:
            return Holder(**json.load(text))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # none, or killed as it was written
