"""Check the sources: has anything come since the last finished run, and is it reason enough to retrain?"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_contracts.data_reports import Snapshot, SourceCheck
from data_contracts.data_spec import ContractSpec, DataSpec
from data_contracts.rows import Row, conversation_from_json
from data_contracts.run_spec import RunSpec, ScheduleSpec
from tasks.data import watermark
from tasks.data.ingestion.sources import find_sources
from tasks.data.ingestion.urls import is_url
from tasks.data.validation.check_rows import kept_row
from tasks.data.validation.core.drift import drift
from tasks.data.validation.validate import batch_profile
from tasks.runtime.store import Store

_ROWS_FOR_DRIFT = 5_000  # the first of the new ones: enough to measure a distance of 0.03


def still_changing(data: DataSpec, quiet_seconds: float) -> str | None:
    """Which file was written a moment ago and may not be complete yet, or None."""
    now = time.time()
    # A file at a URL is there as a whole or not at all; to list it here too would cost its server a call.
    local = data.model_copy(update={"source": [entry for entry in data.source if not is_url(entry)]})
    files = [source for source in find_sources(local)[0] if source.kind == "file"]
    ages = {source.name: now - source.path.stat().st_mtime for source in files}
    young = sorted(name for name, age in ages.items() if age < quiet_seconds)
    if not young:
        return None
    more = f" and {len(young) - 1} more" if len(young) > 1 else ""
    return f"{young[0]}{more} changed {ages[young[0]]:.0f} s ago: read once quiet for {quiet_seconds:g} s"


def decide_retrain(
    store: Store, spec: RunSpec, snapshot: Snapshot, champion_days: float | None
) -> tuple[SourceCheck, bool, str]:
    """What the check of the sources found, whether a retrain is due, and why or why not. The check is kept."""
    found = check_sources(store, spec.model.name, snapshot, spec.contract)
    watermark.keep_check(store, spec.model.name, found)
    drifts = watermark.drifted_checks(store, spec.model.name)
    return found, *reason_to_retrain(found, drifts, champion_days, spec.schedule)


def check_sources(store: Store, scope: str, snapshot: Snapshot, contract: ContractSpec) -> SourceCheck:
    """Count the rows that no finished run has seen, and measure how far they are from those of the last one."""
    last = watermark.last_finished(store, scope)
    if last and last.snapshot_id == snapshot.id:
        count = watermark.count_known_rows(store, scope)
        return SourceCheck(snapshot_id=snapshot.id, new_rows=0, known_rows=count, drift={}, drifted=[])
    known = watermark.known_rows(store, scope)
    fresh = _new_rows([store.path(part) for part in snapshot.parts], known)
    distances: dict[str, float] = {}
    if last and fresh:
        before = json.loads(store.path(last.profile).read_text(encoding="utf-8"))
        distances = drift(batch_profile(_numbers(list(fresh.values()))), before)
    limits = (contract.max_length_drift, contract.max_share_drift)
    above = drifted(len(fresh), distances, *limits)
    return SourceCheck(
        snapshot_id=snapshot.id, new_rows=len(fresh), known_rows=len(known), drift=distances, drifted=above
    )


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
                row = Row(conversation_from_json(messages), source, line)
            found[row_id] = row
    return found


def _numbers(rows: list[Row | None]) -> pd.DataFrame:
    kept = [kept_row("", row)._asdict() for row in rows if row is not None]
    return pd.DataFrame(kept, columns=["source", "language", "prompt_chars", "completion_chars", "answer_hash"])


_ROWS_TO_JUDGE: Final = 30
"""Distances of fewer rows are mostly chance: of 30 rows from the very same distribution, one in a hundred samples is
0.3 away or more (Kolmogorov's 1.63 / sqrt(n))."""


def drifted(new_rows: int, drift: Mapping[str, float], max_length_drift: float, max_share_drift: float) -> list[str]:
    """The distances of `tasks.data.validation.core.drift.drift` that are above their limits, worst first; none if the rows are few.

    Shares of sources do not count: a new file in the inbox is a new source, and that is no drift.
    """
    if new_rows < _ROWS_TO_JUDGE:
        return []
    limits = {name: max_length_drift if name.startswith("ks_") else max_share_drift for name in drift}
    above = {name: drift[name] / limit for name, limit in limits.items() if drift[name] > limit and name != "kl_source"}
    return sorted(above, key=lambda name: -above[name])


def reason_to_retrain(
    found: SourceCheck, drifts: Sequence[bool], champion_days: float | None, schedule: ScheduleSpec
) -> tuple[bool, str]:
    """Whether a retrain is due, and why or why not.

    drifts: whether the new rows had drifted, for every check that found some, oldest first, this one included.
    """
    if not found.known_rows:
        return True, f"no run has finished on these data yet: {found.new_rows:,} rows"
    if not found.new_rows:
        return False, "nothing new since the last finished run"
    share = found.new_rows / found.known_rows
    news = f"{found.new_rows:,} new rows, {share:.1%} of the {found.known_rows:,} known"
    if found.new_rows >= schedule.min_new_rows and share >= schedule.min_new_share:
        return True, news
    window = drifts[-schedule.drift_window :]
    if schedule.drift_needed and sum(window) >= schedule.drift_needed:
        worst = ", ".join(f"{name} {found.drift[name]:.2f}" for name in found.drifted)
        return True, f"{news}; drift in {sum(window)} of the last {len(window)} looks ({worst or 'not in this one'})"
    limit = schedule.max_champion_days
    if limit is not None and champion_days is not None and champion_days > limit:
        return True, f"{news}; the champion is {champion_days:.0f} days old, limit {limit:g}"
    return False, f"{news}; a retrain needs {schedule.min_new_rows:,} and {schedule.min_new_share:.1%}"
