"""Rows back from quarantine: a person overrules a reason, the ledger remembers who and why, the data are made anew."""

import json
from pathlib import Path

from data_contracts.data_reports import DatasetManifest
from data_contracts.errors import ConfigError, DataError, Problem
from data_contracts.reports import Stage
from data_contracts.rules import LEAKS, UNREADABLE, Reason
from data_contracts.run_spec import RunSpec
from flows.retrain import prepare_data
from tasks.data.curation import row_ledger as ledger
from tasks.runtime.store import Store


def release(spec: RunSpec, reason: str, why: str, rows: list[str]) -> tuple[DatasetManifest, list[Stage]]:
    """Overrule `reason` for the quarantined rows whose id begins with one of `rows` (all, if none is given).

    Raises ConfigError if the reason cannot be overruled or no such row is there.
    """
    _check(reason, why)
    store = Store(Path(spec.store.root))
    quarantine = _quarantine(spec, store)
    with quarantine.open(encoding="utf-8") as file:
        rejected = [(item["row_id"], item["reason"]) for item in map(json.loads, file)]
    found = [i for i, r in rejected if r == reason and (not rows or i.startswith(tuple(rows)))]
    if not found:
        there = ", ".join(sorted({r for _, r in rejected})) or "nothing"
        raise ConfigError(Problem(f"no such row is in quarantine for {reason}", str(quarantine), f"there: {there}"))
    ledger.release(store, spec.model.name, found, reason, why)
    return prepare_data(spec)


def _check(reason: str, why: str) -> None:
    problems = []
    if not why.strip():
        problems.append(Problem("--why is empty", "data release", act='say it for whoever asks later: --why "..."'))
    if reason not in set(Reason):
        known = ", ".join(sorted(set(Reason) - UNREADABLE - LEAKS))
        problems.append(Problem(f"no such reason: {reason}", "data release", known))
    elif Reason(reason) in UNREADABLE:
        act = "repair the rows in their source and run `tunegate data` again"
        problems.append(
            Problem(f"{reason} cannot be overruled: there is no usable conversation", "data release", act=act)
        )
    elif Reason(reason) in LEAKS:
        act = "nothing is wrong with the rows; they lie too near to what is measured"
        problems.append(Problem(f"{reason} cannot be overruled: a held-out item would leak", "data release", act=act))
    if problems:
        raise ConfigError(*problems)


def _quarantine(spec: RunSpec, store: Store) -> Path:
    """The quarantine of the data as they are now; also of a batch that its contract has stopped."""
    try:
        return store.path(prepare_data(spec)[0].quarantine)
    except DataError:
        stopped = sorted(store.files.glob("validated/*/quarantine.jsonl"), key=lambda path: path.stat().st_mtime)
        if not stopped:
            raise
        return stopped[-1]
