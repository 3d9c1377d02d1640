"""Files that several processes share: written whole, and locked."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_contracts.errors import TunegateError


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file so that it is complete or absent, whenever the process is killed.

    durable: the text is on the disk before the name is. A name that must survive a power cut needs a sync of its folder too.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    draft.replace(path)


@contextmanager
def exclusive(path: Path, busy: TunegateError, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` for the block; the system frees it the moment its holder dies.

    Raises `busy` if another process still holds it after so many seconds; negative seconds wait as long as it takes. On a
    shared volume this holds between machines only if the volume keeps POSIX locks (NFS 4 does).
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.release()
