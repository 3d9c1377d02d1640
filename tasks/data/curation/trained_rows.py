"""The ids of the rows that a model was trained on, as a file of the store. Its own file: the keys of releases hold it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from data_contracts.data_reports import FileRef
from tasks.runtime.store import Store, content_key

TRAINED_ROWS_FILE: Final = "trained_rows.txt"


def ids_of(rows: Path) -> list[str]:
    """The row ids of a split's file, in its order."""
    with rows.open(encoding="utf-8") as lines:
        return [json.loads(line)["row_id"] for line in lines]


def read_ids(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split()


def publish_ids(store: Store, row_ids: Iterable[str]) -> FileRef:
    """Keep ids in the store, one a line, sorted."""
    text = "".join(f"{row}\n" for row in sorted(set(row_ids)))
    with store.publish("trained_rows", content_key(text)[:32]) as folder:
        (folder / TRAINED_ROWS_FILE).write_text(text, encoding="utf-8")
    return store.ref(store.files / "trained_rows" / content_key(text)[:32] / TRAINED_ROWS_FILE)
