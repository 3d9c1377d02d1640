"""What `data.source` names, and a digest of each that is cheap enough to be a cache key."""

import difflib
import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Final, Literal

from data_contracts.data_spec import DataSpec
from data_contracts.errors import ConfigError, Problem, TransientError
from tasks.data.ingestion import urls
from tasks.data.ingestion.encodings import data_suffix
from tasks.runtime.processes import Display
from tasks.runtime.store import Store, digest

SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
BUILTINS: Final = ("python-docs",)
# ORG/NAME@REVISION: anything else could be a path, which the library would read instead.
_HUB_NAME: Final = re.compile(r"[\w-]+(\.[\w-]+)*(/[\w-]+(\.[\w-]+)*)?(@[\w-]+([./][\w-]+)*)?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """One file, hub data set or builder. `name` is unique in a run and holds no path of this machine."""

    name: str
    kind: Literal["file", "url", "hub", "builtin"]
    address: str  # the file's path, here or in its store, ORG/NAME, or the builder's name
    version: str = ""  # of a file at a URL: what its store says of its content; of a hub data set: the one asked for
    entry: str = ""  # of a file at a URL: the entry that named it
    place: str = ""  # of a file at a URL: host or bucket and folders

    @property
    def path(self) -> Path:
        return Path(self.address)


def find_sources(data: DataSpec) -> tuple[list[Source], list[Problem]]:
    """Every source sorted by name, so that the order in which they are listed means nothing, and all problems."""
    paths: dict[Path, None] = {}
    remote: dict[str, Source] = {}
    found: list[Source] = []
    problems: list[Problem] = []
    for entry in dict.fromkeys(item.removeprefix("file://") for item in data.source):
        scheme, _, rest = entry.partition(":")
        if scheme == "builtin":
            found += [Source(rest, "builtin", rest)] if rest in BUILTINS else []
            problems += [] if rest in BUILTINS else [_unknown_builtin(entry)]
        elif scheme == "hub":
            name, _, version = rest.partition("@")
            found += [Source(rest, "hub", name, version)] if _HUB_NAME.fullmatch(rest) else []
            problems += [] if _HUB_NAME.fullmatch(rest) else [_no_hub_name(entry)]
        elif urls.is_url(entry):
            matched, wrong = _at_url(entry)
            remote.update((f"{scheme}://{source.place}", source) for source in matched)
            problems += wrong
        else:
            matches = _files(entry)
            paths.update(dict.fromkeys(path.resolve() for path in matches if data_suffix(path) in SUFFIXES))
            problems += _file_problems(entry, matches)
    if not data.source:
        problems.append(Problem("no source is given", "data.source", act="--set data.source='[\"rows.jsonl\"]'"))
    found += [Source("", "file", str(path)) for path in paths]
    return sorted(_named([*found, *remote.values()]), key=lambda source: source.name), problems


def source_digests(data: DataSpec) -> dict[str, str]:
    """What the ingest stage's result depends on besides its configuration: one digest a source.

    Sources that cannot be found are left out: reading them raises the error, with everything else that is wrong.
    """
    return {f"{source.kind}:{source.name}": _digest(source, data) for source in find_sources(data)[0]}


def _digest(source: Source, data: DataSpec) -> str:
    if source.kind == "file":
        return digest(source.path)
    if source.kind == "url":
        return source.version
    if source.kind == "hub":
        return _hub_revision(source)
    return hashlib.sha256("\n".join([sys.version, *map(_package_stamp, data.packages)]).encode()).hexdigest()


def _hub_revision(source: Source) -> str:
    """The commit that its branch or tag is at now, or "unknown" without a network."""
    import httpx
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.address, revision=source.version or None, timeout=5).sha or "unknown"
    except (OSError, ValueError, httpx.HTTPError):
        return "unknown"


def _package_stamp(package: str) -> str:
    """Names, sizes and times of a package's source files: what an upgrade or an edit changes. Imports nothing."""
    if package == "stdlib":
        return "stdlib"  # sys.version says it all
    # The builder runs with the working directory on its path, so it is searched here too.
    spec = PathFinder.find_spec(package.partition(".")[0], [*sys.path, os.getcwd()])
    roots = [Path(root) for root in (spec.submodule_search_locations or [spec.origin or ""])] if spec else []
    files = sorted(file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py")))
    lines = (f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    return f"{package}\n" + "\n".join(lines)


def _files(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        visible = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return sorted(p for p in visible if p.is_file() and data_suffix(p) in SUFFIXES)
    if path.exists() or not glob.has_magic(entry):
        return [path] if path.exists() else []
    return sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())


def _file_problems(entry: str, matches: list[Path]) -> Iterator[Problem]:
    path = Path(entry).expanduser()
    known = ", ".join(SUFFIXES)
    if path.is_dir() and not matches:
        yield Problem(f"no data file in this folder; it holds {_listing(path)}", entry, known)
    elif not matches and glob.has_magic(entry):
        folder = next(p for p in path.parents if not glob.has_magic(str(p)))
        yield Problem("nothing matches this pattern", entry, act=_nearby(folder, path.name))
    elif not matches:
        yield Problem("no such file or folder", entry, act=_nearby(path.parent, path.name))
    for match in matches:
        if data_suffix(match) not in SUFFIXES:
            yield Problem(
                f"unknown file type {match.suffix or '(no suffix)'}", str(match), known, "convert or rename it"
            )


def _at_url(entry: str) -> tuple[list[Source], list[Problem]]:
    try:
        files = urls.find_files(entry)
    except ConfigError as error:
        return [], list(error.problems)
    known = ", ".join(SUFFIXES)
    readable = [file for file in files if data_suffix(PurePosixPath(file.place)) in SUFFIXES]
    found = [Source("", "url", file.path, file.version, entry, file.place) for file in readable]
    if found:
        return found, []
    what = f"of {len(files)} files there none has a known type" if files else "nothing is there"
    return [], [Problem(what, urls.without_query(entry), known, "check the address")]


def _nearby(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"check the path: the folder {folder} does not exist"
    close = difflib.get_close_matches(name, [p.name for p in folder.iterdir()], n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"check the name: {folder} holds {_listing(folder)}"


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"


def _unknown_builtin(entry: str) -> Problem:
    return Problem("no such built-in data set", entry, ", ".join(f"builtin:{name}" for name in BUILTINS))


def _no_hub_name(entry: str) -> Problem:
    return Problem(
        "no name of a data set on the hub", entry, "hub:ORG/NAME or hub:ORG/NAME@REVISION", "correct the name"
    )


def _named(sources: list[Source]) -> list[Source]:
    """Files get short names; the others have theirs."""
    files = [source for source in sources if not source.name]
    names = _short_names([PurePosixPath(source.place) if source.place else source.path for source in files])
    named = [replace(source, name=name) for source, name in zip(files, names, strict=True)]
    return [source for source in sources if source.name] + named


def _short_names(paths: Sequence[PurePath]) -> list[str]:
    """For each path the shortest tail that no other path shares: `rows.jsonl`, or `a/rows.jsonl` and `b/rows.jsonl`."""
    taken: dict[str, int] = {}
    tails = [["/".join(path.parts[-n:]) for n in range(1, len(path.parts) + 1)] for path in paths]
    for tail in (tail for options in tails for tail in options):
        taken[tail] = taken.get(tail, 0) + 1
    return [next((tail for tail in options if taken[tail] == 1), options[-1]) for options in tails]


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
        raise TransientError(Problem("changed while it was read", source.name, act="retry"))
    if now.size is not None and now.size != to.stat().st_size:
        limit = f"{now.size} bytes"
        raise TransientError(Problem(f"only {to.stat().st_size} bytes came", source.name, limit, "retry"))
