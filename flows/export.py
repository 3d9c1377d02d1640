"""Export a registered version: measured in every form, written, read back, published atomically."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_contracts.errors import ConfigError, Problem, WorkerError
from data_contracts.exports import Exported
from data_contracts.run_spec import StoreSpec
from tasks.export import card, steps
from tasks.export.request import ExportRequest, check_request, export_source
from tasks.release import registry
from tasks.runtime.console import note
from tasks.runtime.store import Store


def export_version(store: StoreSpec, uri: str, to: Path, request: ExportRequest) -> Exported:
    """Write a version to `to`. Raises GateError, with everything that was measured, if no form is near enough; then `to` is as it was."""
    check_place(to)
    version = registry.resolve(store, uri, "export")
    source = export_source(store, version)
    check_request(source, request)
    with work_folder(Store.of(store)) as work, draft_of(to) as draft:
        note(f"exporting {version.label} as {request.format}")
        measured = steps.measure_forms(source, request, work)
        notes = steps.write_files(source, request, measured, work, draft)
        found = steps.check_files(source, request, measured, work, draft, notes)
        card.write_card(found, source, draft)
    return found


def check_place(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(Problem(f"{to} is there, and not an empty folder", "--to", act="name a new folder"))


@contextmanager
def draft_of(to: Path) -> Iterator[Path]:
    """Yield a folder next to `to`, which becomes `to` only if the block succeeds."""
    to.absolute().parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.absolute().parent))
    try:
        yield draft
        draft.chmod(0o755)
        for file in draft.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for its own user only
        draft.replace(to.absolute())
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def work_folder(store: Store) -> Iterator[Path]:
    """A folder of the store for the time of an export; kept, with its logs, if a worker breaks."""
    place = store.files / "exports"
    place.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=place))
    try:
        yield work
    except WorkerError:
        raise
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)
