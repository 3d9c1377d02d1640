"""Files at URLs become files of the store: each version is fetched once, and complete or absent."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from data_contracts.errors import Problem, TransientError
from tasks.data.ingestion import urls
from tasks.data.ingestion.sources import Source
from tasks.runtime.processes import Display
from tasks.runtime.store import Store

_QUIET_SECONDS = 2.0
_MEGABYTE = 1_000_000
_UNUSUAL = re.compile(r"[^\w. -]")  # in a file's name: another machine chose it
_MOST_CHARS = 60


def local_copies(store: Store, sources: list[Source]) -> list[Source]:
    """The same sources; those at URLs as files in `downloads/`, which may be deleted: they are fetched again."""
    with Display("download", after=_QUIET_SECONDS) as display:
        return [_local_copy(store, source, display) if source.kind == "url" else source for source in sources]


def _local_copy(store: Store, source: Source, display: Display) -> Source:
    # The entry's pattern is no part of it: the same file by another pattern is the same file.
    named = f"{source.entry.partition('://')[0]} {source.place} {source.version}"
    key = hashlib.sha256(named.encode()).hexdigest()
    name = _UNUSUAL.sub("_", PurePosixPath(source.place).name)[-_MOST_CHARS:]
    file = store.files / "downloads" / key / name
    if not file.exists():
        with store.publish("downloads", key) as folder:
            _fetch(source, folder / name, display)
    return replace(source, kind="file", address=str(file))


def _fetch(source: Source, to: Path, display: Display) -> None:
    """Raises TransientError if it came incomplete, or is another file by now."""
    from fsspec.callbacks import Callback

    def show(size: int | None, value: int, **_: Any) -> None:
        of = size // _MEGABYTE if size else None
        display.show({"event": "progress", "what": f"{source.name}, MB", "done": value // _MEGABYTE, "of": of})

    with urls.errors_of(source.entry):
        urls.file_system(source.entry)[0].get_file(source.address, str(to), callback=Callback(hooks={"show": show}))
        now = urls.info(source.entry, source.address)
    if now.version != source.version:
        raise TransientError(Problem("changed while it was read", source.name, act="try again"))
    if now.size is not None and now.size != to.stat().st_size:
        limit = f"{now.size} bytes"
        raise TransientError(Problem(f"only {to.stat().st_size} bytes came", source.name, limit, "try again"))
