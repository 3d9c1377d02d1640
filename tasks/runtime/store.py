"""The store: the only module that knows the places of files. One folder to back up.

ROOT/mlflow.db          MLflow's database
ROOT/artifacts/         MLflow's artifacts
ROOT/store/             snapshots, data sets, bases, adapters, evaluations, the ledger, Prefect's state
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from data_contracts.data_reports import FileRef
from data_contracts.errors import Problem, StoreError
from data_contracts.reports import RunReport
from data_contracts.run_spec import StoreSpec
from tasks.runtime.core.files import exclusive, write_atomically

# Flows import no `core`: for their files in the store they take the two functions from here.
__all__ = ["Store", "exclusive", "write_atomically"]

_FREE_BYTES_NEEDED = 2 * 1024**3  # the default base (0.5 GB) twice while it is converted, checkpoints, artifacts


@dataclass(frozen=True)
class Store:
    """Paths under one root. What it publishes is complete or absent, never half-written."""

    root: Path

    @classmethod
    def of(cls, spec: StoreSpec) -> Self:
        """The store that a spec names."""
        return cls(Path(spec.root))

    @property
    def files(self) -> Path:
        return self.root / "store"

    @property
    def database_uri(self) -> str:
        return f"sqlite:///{self.root.resolve() / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        return self.root.resolve() / "artifacts"

    @property
    def ledger(self) -> Path:
        return self.files / "ledger.db"

    def ref(self, path: Path) -> FileRef:
        """Name a file or folder of the store by relative path and content."""
        return FileRef(path=path.resolve().relative_to(self.files.resolve()).as_posix(), sha256=digest(path))

    def path(self, ref: FileRef | str) -> Path:
        """Where a manifest's file is now. Raises StoreError if it is gone, or its name climbs out of its folder.

        A whole path is that of another store, as `reproduce` reads.
        """
        relative = ref if isinstance(ref, str) else ref.path
        path = self.files / relative
        if ".." in PurePosixPath(relative).parts or "\0" in relative:
            raise StoreError(
                Problem(f"{relative!r} leads out of the store", str(self.files), act="run again with --force")
            )
        if not path.exists():
            raise StoreError(
                Problem(f"{relative} is recorded but gone", str(self.files), act="run again with --force to rebuild it")
            )
        return path

    @contextmanager
    def publish(self, kind: str, name: str) -> Iterator[Path]:
        """Yield an empty folder to fill; it becomes `store/kind/name` only if the block succeeds.

        Names hold a content key: what is there already has the same content and is replaced by it.
        """
        final = self.files / kind / name
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name[:24]}-", dir=final.parent))
        try:
            yield draft
            if final.exists():
                shutil.rmtree(final)
            draft.chmod(0o755)
            draft.rename(final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def write_report(self, report: RunReport) -> None:
        """Keep a finished run's report under its run id."""
        with self.publish("runs", report.run_id) as folder:
            (folder / "report.json").write_text(report.model_dump_json(indent=1))

    def newest_spec(self, model: str) -> dict[str, Any] | None:
        """The spec of the newest finished run of this model."""
        files = sorted(self.files.glob("runs/*/report.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        specs: Iterator[dict[str, Any]] = (json.loads(file.read_bytes())["spec"] for file in files)
        return next((spec for spec in specs if spec["model"]["name"] == model), None)

    def check_room(self, needed: int = _FREE_BYTES_NEEDED) -> None:
        """Raise StoreError before the work starts if the disk cannot hold it."""
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise StoreError(
                Problem(
                    f"{free / 1024**3:.1f} GiB free",
                    str(self.root),
                    f"{needed / 1024**3:.1f} GiB needed",
                    "free some room, or move the store with --set store.root=DIR",
                )
            )


def without_place(name: str) -> str:
    """A path of this machine by its last part; anything else, such as a hub id or a URL, as it is."""
    path = name.removeprefix("file://")
    return Path(path).name if path.startswith(("/", "~")) else name


def digest(path: Path) -> str:
    """Hex sha256 of a file's bytes, or of a folder's sorted (relative path, file digest) pairs."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = (f"{p.relative_to(path).as_posix()} {digest(p)}\n" for p in sorted(path.rglob("*")) if p.is_file())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def draft_folder(store: Store, kind: str) -> Iterator[Path]:
    """An empty folder next to the published ones of this kind; what is still in it at the end is deleted."""
    parent = store.files / kind
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".draft-") as folder:
        yield Path(folder)


def publish_draft(store: Store, kind: str, draft: Path, names: list[str], key: str) -> Path:
    """Move the named files and folders of the draft to `store/kind/key`, all or none of them."""
    with store.publish(kind, key) as folder:
        for name in names:
            (draft / name).rename(folder / name)
    return store.files / kind / key


def content_key(*parts: str) -> str:
    """Hex sha256 of the parts, each ended by a line feed."""
    return hashlib.sha256("".join(f"{part}\n" for part in parts).encode()).hexdigest()
