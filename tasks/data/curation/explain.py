"""One row's whole story: what came in, what was done to it, where it is now, and what happened to it in earlier batches."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_contracts.data_reports import DataState, RowStory
from data_contracts.errors import ConfigError, Problem
from data_contracts.rows import conversation_from_json
from tasks.data.curation import row_ledger as ledger
from tasks.runtime.core.files import write_atomically
from tasks.runtime.store import Store

_FILES: Final = ("train", "validation", "test", "duplicate_rows", "quarantine")


def read_data_state(store: Store, scope: str) -> DataState:
    """The newest data set of a model. Raises ConfigError if there is none."""
    path = state_file(store, scope)
    if not path.exists():
        raise ConfigError(Problem(f"no data set of {scope} yet", str(path), act="make one with `tunegate data`"))
    return DataState.model_validate_json(path.read_bytes())


def write_data_state(store: Store, scope: str, state: DataState) -> None:
    write_atomically(state_file(store, scope), state.model_dump_json())


def state_file(store: Store, scope: str) -> Path:
    return store.files / "datasets" / f"{scope}.json"


def row_stories(store: Store, scope: str, row: str) -> list[RowStory]:
    """The rows that `row` names, by the first digits of an id or as FILE:LINE. Raises ConfigError if there are none."""
    state = read_data_state(store, scope)
    found = [item for part in state.snapshot.parts for item in _matching(store.path(part), row)]
    if not found:
        act = "give FILE:LINE as `tunegate data` shows it, or the first digits of a row id"
        raise ConfigError(Problem(f"no row is called {row!r}", f"snapshot {state.snapshot.id[:16]}", act=act))
    released = ledger.releases(store, scope)
    return [
        RowStory(
            row_id=item["row_id"],
            source=item["source"],
            line=item["line"],
            raw=item["raw"],
            read=[list(message) for message in conversation_from_json(item["messages"])] if item["messages"] else None,
            now=_now(store, state, item),
            history=[list(event) for event in ledger.row_history(store, scope, item["row_id"])],
            releases=[release._asdict() for release in released if release.row_id == item["row_id"]],
        )
        for item in found
    ]


def _matching(part: Path, row: str) -> list[dict[str, Any]]:
    source, _, line = row.rpartition(":")
    table = pq.read_table(part)
    if source and line.isdecimal():
        mask = pc.and_(pc.equal(table["source"], source), pc.equal(table["line"], int(line)))
    else:
        mask = pc.starts_with(table["row_id"], row)
    matching: list[dict[str, Any]] = table.filter(mask).to_pylist()
    return matching


def _now(store: Store, state: DataState, item: dict[str, Any]) -> dict[str, Any]:
    """The file that holds the row now, and its line there."""
    for name in _FILES:
        for line in _lines(store.path(getattr(state.dataset, name)), item["row_id"]):
            if (line["source"], line["line"]) == (item["source"], item["line"]):
                return {"file": name, **line}
    raise AssertionError(f"row {item['row_id']} of the snapshot is in no file of its data set")


def _lines(path: Path, row_id: str) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if row_id in line[:90]:
                yield json.loads(line)
