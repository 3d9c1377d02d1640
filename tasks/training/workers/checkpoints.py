"""Checkpoints that are complete or absent: Trainer writes the files, a manifest written last makes them count.

`checkpoint-STEP/manifest.json` names every file's size and sha256. A folder without it, or with a file that differs
from it, is no checkpoint. What is loaded is in the run's own folder, in files and not behind links.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_contracts.errors import Problem, StoreError
from tasks.runtime.core.files import write_atomically
from tasks.runtime.workers.harness import say
from tasks.runtime.workers.ranks import ranks

_KEPT = 2  # the newest may turn out unreadable
_MANIFEST = "manifest.json"
_STATE = "trainer_state.json"


@contextmanager
def published(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Make what the block writes into `folder` a checkpoint, and delete older ones; on failure leave no trace.

    Raises StoreError if the disk does not take it.
    """
    try:
        yield
        _seal(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError of its C++ container.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise StoreError(_unwritten(folder, needed_bytes, error)) from error
    _delete_old_ones(folder.parent)


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run. Newer ones that are not complete are named and deleted."""
    for folder in _folders(out):
        fault = _fault(folder) or next((f"its best, {b.name}: {f}" for b in _best(folder) if (f := _fault(b))), None)
        if fault is None:
            return folder
        say("note", text=f"{folder.name} is skipped: {fault}")
        shutil.rmtree(folder)
    return None


def step_of(folder: Path | None) -> int:
    return int(folder.name.rpartition("-")[2]) if folder else 0


def state_of(folder: Path | None) -> dict[str, Any]:
    """Trainer's state in a checkpoint: log_history, best_global_step, stateful_callbacks and more. Raises
    ValueError."""
    return _json_object(folder / _STATE) if folder else {}


def last_good(out: Path) -> str:
    """What an error says of the checkpoints of a run that stops."""
    folder = next((folder for folder in _folders(out) if (folder / _MANIFEST).exists()), None)
    return f"the last good checkpoint is {folder}" if folder else "there is no checkpoint yet"


def _folders(out: Path) -> list[Path]:
    """Newest first."""
    found = (folder for folder in out.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal())
    return sorted(found, key=step_of, reverse=True)


def _best(folder: Path) -> list[Path]:
    """The checkpoint with the lowest validation loss so far, if any: a run ends with its adapter."""
    try:
        step = state_of(folder).get("best_global_step")
    except ValueError:  # damaged since it was written: found when it is read
        return []
    return [folder.parent / f"checkpoint-{step}"] if type(step) is int and step > 0 else []


def _delete_old_ones(out: Path) -> None:
    kept = [folder for folder in _folders(out) if (folder / _MANIFEST).exists()][:_KEPT]
    kept += [best for folder in kept for best in _best(folder)]
    for folder in _folders(out):
        if folder not in kept:
            shutil.rmtree(folder)


# --- complete or absent -------------------------------------------------------------------------------------


def _seal(folder: Path) -> None:
    """Write the manifest once every file is on the disk."""
    manifest = {name: _identity(folder / name) for name in _files(folder)}
    for name in manifest:
        _sync(folder / name)
    write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1), durable=True)
    _sync(folder)
    _sync(folder.parent)


def _fault(folder: Path) -> str | None:
    """Why this folder is no checkpoint; None if it is one."""
    if not (folder / _MANIFEST).exists():
        return "it was never finished"
    try:
        manifest = {name: str(identity) for name, identity in _json_object(folder / _MANIFEST).items()}
    except ValueError:
        return f"{_MANIFEST} is damaged"
    if strange := set(manifest) ^ set(_files(folder)):
        return f"{min(strange)} is missing, or does not belong to it"
    if not _random_states() <= set(manifest):
        return "another number of workers wrote it"
    for name, identity in manifest.items():
        path, size = folder / name, identity.partition(" ")[0]
        if not path.resolve().is_relative_to(folder.parent.resolve()):
            return f"{name} is a link to elsewhere"
        if str(path.stat().st_size) != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _identity(path) != identity:
            return f"{name} is damaged (its sha256 is another)"
    return None


def _random_states() -> set[str]:
    """The files in which Trainer keeps each rank's random states."""
    return {f"rng_state_{number}.pth" for number in range(ranks())} if ranks() > 1 else {"rng_state.pth"}


def _json_object(file: Path) -> dict[str, Any]:
    """Raises ValueError for everything else, however deep."""
    try:
        return dict(json.loads(file.read_bytes()).items())
    except (AttributeError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON object") from error


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.name != _MANIFEST)


def _identity(path: Path) -> str:
    """Size in bytes and sha256."""
    with path.open("rb") as file:
        return f"{path.stat().st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritten(folder: Path, needed_bytes: int, error: Exception) -> Problem:
    free = shutil.disk_usage(folder.parent).free
    limit = f"it needs {needed_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
    act = f"make room, or move the store (store.root), and run again: {last_good(folder.parent)}"
    # torch's own message is a line of its C++ sources and two offsets.
    cause = "the disk took only a part of a file" if isinstance(error, RuntimeError) else str(error)
    return Problem(f"{folder.name} could not be written: {cause}", str(folder.parent), limit, act)
