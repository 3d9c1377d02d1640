"""Look at the sources: has anything come since the last finished run, and is it reason enough to retrain?"""

import json
import time
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_contracts.data_reports import Snapshot
from data_contracts.data_spec import ContractSpec, DataSpec
from data_contracts.rows import Row, from_json
from data_contracts.run_spec import RunSpec
from data_contracts.watch_reports import Look
from tasks.data import watermark
from tasks.data.freshness_part import drifted, reason_to_retrain
from tasks.data.ingestion.sources import find_sources
from tasks.data.ingestion.urls import is_url
from tasks.data.validation.check_rows import kept_row
from tasks.data.validation.core.drift import drift
from tasks.data.validation.validate import batch_profile
from tasks.runtime.store import Store

_ROWS_FOR_DRIFT = 5_000  # the first of the new ones: enough to tell a distance of 0.03


def still_changing(data: DataSpec, quiet_seconds: float) -> str | None:
    """Which file was written a moment ago and may not be complete yet, or None."""
    now = time.time()
    # What lies at a URL is there as a whole or not at all; to list it here too would cost its server a call.
    local = data.model_copy(update={"source": [entry for entry in data.source if not is_url(entry)]})
    files = [source for source in find_sources(local)[0] if source.kind == "file"]
    ages = {source.name: now - source.path.stat().st_mtime for source in files}
    young = sorted(name for name, age in ages.items() if age < quiet_seconds)
    if not young:
        return None
    more = f" and {len(young) - 1} more" if len(young) > 1 else ""
    return f"{young[0]}{more} changed {ages[young[0]]:.0f} s ago: read once quiet for {quiet_seconds:g} s"


def decide(store: Store, spec: RunSpec, snapshot: Snapshot, champion_days: float | None) -> tuple[Look, bool, str]:
    """What the look found, whether a retrain is due, and why or why not. The look is remembered."""
    found = look(store, spec.model.name, snapshot, spec.contract)
    watermark.remember(store, spec.model.name, found)
    looks = watermark.drifted_looks(store, spec.model.name)
    return found, *reason_to_retrain(found, looks, champion_days, spec.schedule)


def look(store: Store, scope: str, snapshot: Snapshot, contract: ContractSpec) -> Look:
    """Count the rows that no finished run has seen, and measure how far they lie from those of the last one."""
    last = watermark.last_finished(store, scope)
    if last and last.snapshot_id == snapshot.id:
        count = watermark.count_known_rows(store, scope)
        return Look(snapshot_id=snapshot.id, new_rows=0, known_rows=count, drift={}, drifted=[])
    known = watermark.known_rows(store, scope)
    fresh = _new_rows([store.path(part) for part in snapshot.parts], known)
    distances: dict[str, float] = {}
    if last and fresh:
        before = json.loads(store.path(last.profile).read_text(encoding="utf-8"))
        distances = drift(batch_profile(_numbers(list(fresh.values()))), before)
    limits = (contract.max_length_drift, contract.max_share_drift)
    above = drifted(len(fresh), distances, *limits)
    return Look(snapshot_id=snapshot.id, new_rows=len(fresh), known_rows=len(known), drift=distances, drifted=above)


def _new_rows(parts: list[Path], known: set[str]) -> dict[str, Row | None]:
    """Readable rows not known, by id: the first few with their text, of the others only that they are there."""
    found: dict[str, Row | None] = {}
    for part in parts:
        table = pq.read_table(part, columns=["row_id", "source", "line", "messages"])
        readable = table.filter(pc.is_valid(table["messages"]))
        for i, row_id in enumerate(readable["row_id"].to_pylist()):
            if row_id in known or row_id in found:
                continue
            row = None
            if len(found) < _ROWS_FOR_DRIFT:
                source, line, messages = (readable[name][i].as_py() for name in ("source", "line", "messages"))
                row = Row(from_json(messages), source, line)
            found[row_id] = row
    return found


def _numbers(rows: list[Row | None]) -> pd.DataFrame:
    told = [kept_row("", row) for row in rows if row is not None]
    return pd.DataFrame(told, columns=["source", "language", "prompt_chars", "completion_chars", "answer_hash"])
