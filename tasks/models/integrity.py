"""What is loaded is what was registered: versions, adapters and bases are compared with their digests each time.

A version's tags hold the sha256 of its lineage, which holds the sha256 of every other file, among them `meta.json`,
which holds that of the code MLflow runs. Of a version from before there was a lineage only the adapter is checked; that
is logged.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from data_contracts.errors import Problem, StoreError
from data_contracts.lineage import EVIDENCE, LINEAGE_FILE, LINEAGE_TAG
from data_contracts.reports import AdapterRef, BaseModelRef
from tasks.models.core.adapter_files import WEIGHTS, read_bounded_json, scan_adapter, scan_weights
from tasks.runtime.console import note
from tasks.runtime.store import Store, digest

CODE_FILE: Final = "served_model.py"
_LINEAGE: Final = f"{EVIDENCE}/{LINEAGE_FILE}"
# All that MLflow acts on when it loads one of our versions; `code`, `data` and `python_model` would name code or pickles.
_FLAVOR: Final = {
    "artifacts",
    "cloudpickle_version",
    "env",
    "loader_module",
    "model_code_path",
    "python_version",
    "streamable",
}
_LOADER: Final = "mlflow.pyfunc.loaders.code_model"
_CODE: Final = (
    ".bin",
    ".ckpt",
    ".joblib",
    ".pickle",
    ".pkl",
    ".pt",
    ".pth",
    ".py",
    ".pyc",
    ".so",
)  # runs as it is loaded
_RESTORE: Final = "restore the registry's artifacts from a backup, roll back to a whole version, or train again"
_MOST_SHOWN: Final = 12
_MOST_MODEL_BYTES: Final = 16_384

Fault = tuple[str, str]
"""A file of a version, and what is wrong with it."""


def verify_version(version: Path, tags: Mapping[str, str], label: str) -> None:
    """Raise StoreError, with everything that is wrong, unless the files of a version are those that were registered.

    version: the folder as MLflow keeps it or has downloaded it. Its adapter is scanned too, and what MLflow would run
    is checked, for its `MLmodel` could name any module. Nothing of it is executed here.
    """
    files = version / "artifacts"
    expected, faults = _expected(files, tags)
    faults += [
        *_changed(files, expected),
        *_strange(version, {name for name, _ in expected}, is_listed=LINEAGE_TAG in tags),
    ]
    faults += _code_faults(version, tags)
    if not faults:
        adapter = files / "adapter"
        scanned = scan_weights(adapter) if tags.get("tunegate.method") == "full" else scan_adapter(adapter)
        faults = [("adapter", fault) for fault in scanned]
    if faults:
        raise StoreError(*_problems(faults, version, label))
    if LINEAGE_TAG not in tags:
        _note_once(f"{label} was registered without a lineage: only its adapter is checked")


def _problems(faults: list[Fault], version: Path, label: str) -> Iterator[Problem]:
    for name, what in faults[:_MOST_SHOWN]:
        yield Problem(f"{name} of {label} {what}", str(version), act=_RESTORE)
    if (rest := len(faults) - _MOST_SHOWN) > 0:
        yield Problem(f"{rest:,} faults more of {label}", str(version), act=_RESTORE)


@cache
def _note_once(line: str) -> None:
    note(line)


# --- files --------------------------------------------------------------------------------------------------


def _expected(files: Path, tags: Mapping[str, str]) -> tuple[list[tuple[str, str]], list[Fault]]:
    """Names below `files` with the sha256 that tags and lineage give; a folder's is of all that is in it."""
    adapter = "adapter" if tags.get("tunegate.method") == "full" else f"adapter/{WEIGHTS}"
    expected = [(adapter, tags["tunegate.adapter_sha256"])]
    if LINEAGE_TAG not in tags:
        return expected, []
    lineage = (_LINEAGE, tags[LINEAGE_TAG])
    if list(_changed(files, [lineage])):  # what it names then means nothing
        return [lineage, *expected], []
    try:
        named = read_bounded_json(files / _LINEAGE)["files"]
        own = [(name.replace("\0", "?"), str(sha256)) for name, sha256 in named.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [lineage, *expected], [(_LINEAGE, f"names no files ({type(error).__name__})")]
    return list(dict.fromkeys([lineage, *own, *expected])), []


def _changed(files: Path, expected: list[tuple[str, str]]) -> Iterator[Fault]:
    for name, sha256 in expected:
        path = files / name
        inside = path.resolve().is_relative_to(files.resolve())
        found = digest_of(path) if inside and path.exists() else "no file"
        if found != sha256:
            yield name, f"is not the file that was registered ({found[:12]} instead of {sha256[:12]})"


def _strange(version: Path, known: set[str], *, is_listed: bool) -> Iterator[Fault]:
    """Links, code and pickles anywhere in it; artifacts that its lineage, if it has one, does not list."""
    for folder, folders, names in os.walk(version):
        for path in sorted(Path(folder, name) for name in [*folders, *names]):
            name, mode = path.relative_to(version).as_posix(), path.lstat().st_mode
            artifact = name.removeprefix("artifacts/")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                yield name, "is a link, or no plain file"
            elif path.suffix.lower() in _CODE and name != CODE_FILE:
                yield name, "does not belong to it: it could run as it is loaded"
            elif is_listed and stat.S_ISREG(mode) and artifact != name and artifact not in known:
                yield artifact, "is not listed in its lineage"


def _code_faults(version: Path, tags: Mapping[str, str]) -> Iterator[Fault]:
    """What MLflow would run must be the file that was registered, on this version's own files and base."""
    try:
        meta: Any = read_bounded_json(version / "artifacts" / "meta.json")
        code, base = meta.get("code_sha256"), meta["base_digest"]
        model: Any = YAML(typ="safe").load(_model_file(version))
        (flavor,) = [model["flavors"][name] for name in model["flavors"]]
        paths = [str(artifact["path"]) for artifact in flavor["artifacts"].values()]
        runs = (flavor["loader_module"], PurePosixPath(flavor["model_code_path"]).name)
        acts = {name for name, value in flavor.items() if value is not None}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, YAMLError) as error:
        yield "MLmodel or meta.json", f"cannot be read ({type(error).__name__}: {str(error)[:100]})"
        return
    if runs != (_LOADER, CODE_FILE) or "python_function" not in model["flavors"] or acts - _FLAVOR:
        yield "MLmodel", f"would run something else than {CODE_FILE}"
    if {"artifacts/adapter", "artifacts/meta.json"} - set(paths) or any(
        ".." in PurePosixPath(path).parts for path in paths
    ):
        yield "MLmodel", "names other files than its own"
    if base != tags.get("tunegate.base_digest"):
        yield "meta.json", "names another base than its tags"
    if code is not None and code != digest_of(version / CODE_FILE):  # versions from before it was kept have none
        yield CODE_FILE, "is not the file that was registered"


def _model_file(version: Path) -> bytes:
    """Raises ValueError for one that no version has: nested lists of that size would take a parser minutes."""
    with (version / "MLmodel").open("rb") as file:
        text = file.read(_MOST_MODEL_BYTES + 1)
    if len(text) > _MOST_MODEL_BYTES:
        raise ValueError(f"more than {_MOST_MODEL_BYTES:,} bytes")
    return text


def spec_digest(spec: Any) -> str:
    """sha256 of a run's spec as JSON: its file in the registry decides what a gate measures, and which code of yours it
    runs."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def checked_spec(file: Path, sha256: str, label: str) -> Path:
    """The file with a version's spec. Raises StoreError if it is not the one that the version was made with."""
    try:
        found = spec_digest(YAML(typ="safe").load(file.read_bytes()))
    except (ValueError, TypeError, RecursionError, YAMLError) as error:
        found = type(error).__name__
    if found != sha256:
        act = f"{_RESTORE}; or name your own preset"
        raise StoreError(Problem(f"{file.name} of {label} is not the spec it was made with", str(file), act=act))
    return file


# --- in the store -------------------------------------------------------------------------------------------


def checked_base(store: Store, base: BaseModelRef) -> Path:
    """The folder of a base. Raises StoreError if its files are not those that the run has prepared."""
    return _checked(
        store.path(base.path), base.digest, f"the base {base.name}", "run again with --force to prepare it again"
    )


def checked_adapter(store: Store, adapter: AdapterRef) -> Path:
    """The folder of an adapter, in the store or in the registry. Raises StoreError if it is not the one that is
    named."""
    folder = Path(adapter.folder) if Path(adapter.folder).is_absolute() else store.path(adapter.folder)
    named = folder / WEIGHTS if (folder / WEIGHTS).exists() else folder
    _checked(named, adapter.sha256, f"the adapter in {folder.parent.name}", "run again with --force to train it again")
    return folder


def _checked(path: Path, sha256: str, what: str, act: str) -> Path:
    if (found := digest_of(path)) != sha256:
        raise StoreError(Problem(f"{what} has changed ({found[:12]} instead of {sha256[:12]})", str(path), act=act))
    return path


def digest_of(path: Path) -> str:
    """As tasks.runtime.store.digest, and once in a process for each state of a file or folder."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    states = [file.stat() for file in files]
    return _digest(path, tuple((state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states))


@lru_cache(maxsize=4096)
def _digest(path: Path, state: tuple[Any, ...]) -> str:
    return digest(path)


def adapter_ref(store: Store, adapter_folder: Path) -> AdapterRef:
    """sha256: of the adapter's weights, or of the folder where it holds all weights."""
    weights = adapter_folder / WEIGHTS
    return AdapterRef(
        folder=adapter_folder.resolve().relative_to(store.files.resolve()).as_posix(),
        sha256=digest(weights if weights.exists() else adapter_folder),
    )
