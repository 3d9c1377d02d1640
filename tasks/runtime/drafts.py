"""Folders named by content: filled first, named and published when the content is known."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.runtime.store import Store


@contextmanager
def draft_folder(store: Store, kind: str) -> Iterator[Path]:
    """An empty folder beside the published ones of this kind; what is still in it at the end is deleted."""
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
