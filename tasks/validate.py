"""Stage 2: row rules send rows to quarantine, then the batch contract decides whether the rest may be used."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import DataError, Problem
from data_contracts.records import Message, Row
from data_contracts.reports import Snapshot, ValidatedData
from tasks.core.row_rules import check_row
from data_contracts.run_spec import ContractSpec
from tasks.contract import Outcome, load_suite, run_suite
from tasks.drafts import content_key, draft_folder, publish_draft
from tasks.ingest import MESSAGES
from tasks.stores import Store, digest

_BATCH_ROWS = 10_000
_KEPT = pa.schema([("row_id", pa.string()), ("source", pa.string()), ("line", pa.int64()), ("messages", MESSAGES)])
_FILES = ["kept.parquet", "quarantine.jsonl", "contract.json", "data_docs"]


@dataclass
class _Tally:
    """What is learned while rows stream by."""

    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> file:line (detail)
    kept: int = 0
    frames: list[pd.DataFrame] = field(default_factory=list)


def validate(store: Store, snapshot: Snapshot, contract: ContractSpec) -> ValidatedData:
    """Split the snapshot into kept and quarantined rows and hold the batch to its contract.

    Everything is published before a failed contract raises DataError, so that its rows can be looked at.
    """
    suite = load_suite(contract.suite)
    with draft_folder(store, "validated") as draft:
        tally = _apply_row_rules(store.path(snapshot.file), contract.max_chars, draft)
        quarantined = tally.reasons.total()
        if snapshot.rows_in != tally.kept + quarantined:
            raise AssertionError(f"{snapshot.rows_in} rows in, {tally.kept} kept + {quarantined} quarantined")
        budgets = contract.model_dump(include={"max_quarantine_rate", "min_rows", "max_chars"})
        outcomes = run_suite(suite, pd.concat(tally.frames, ignore_index=True), budgets, draft / "data_docs")
        result = {"suite": suite["name"], "parameters": budgets, "results": [item._asdict() for item in outcomes]}
        (draft / "contract.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        key = content_key(snapshot.id, *(digest(draft / name) for name in _FILES[:3]))
        folder = publish_draft(store, "validated", draft, _FILES, key)
    failed = [item for item in outcomes if not item.success and item.severity == "critical"]
    if failed:
        raise DataError(*_problems(failed, tally, folder / "quarantine.jsonl"))
    return ValidatedData(
        snapshot_id=snapshot.id,
        kept=store.ref(folder / "kept.parquet"),
        quarantine=store.ref(folder / "quarantine.jsonl"),
        rows_in=snapshot.rows_in,
        rows_kept=tally.kept,
        reasons=dict(tally.reasons.most_common()),
        contract_result=store.ref(folder / "contract.json"),
        data_docs=f"validated/{key}/data_docs/index.html",
    )


def _apply_row_rules(snapshot: Path, max_chars: int, draft: Path) -> _Tally:
    tally = _Tally()
    with (
        pq.ParquetWriter(draft / "kept.parquet", _KEPT, compression="zstd") as kept,
        (draft / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine,
    ):
        for batch in pq.ParquetFile(snapshot).iter_batches(_BATCH_ROWS):
            rows = list(_checked(batch.to_pylist(), max_chars))
            good = [row for row in rows if row["reason"] is None]
            kept.write_table(pa.Table.from_pylist(good, schema=_KEPT))
            quarantine.writelines(_quarantine_line(row) for row in rows if row["reason"] is not None)
            tally.kept += len(good)
            tally.frames.append(_frame(rows))
            for row in rows:
                if row["reason"] is not None:
                    tally.reasons[row["reason"]] += 1
                    tally.examples.setdefault(row["reason"], f"{row['source']}:{row['line']} {row['detail']}")
    return tally


def _checked(rows: list[dict[str, Any]], max_chars: int) -> Iterator[dict[str, Any]]:
    """The same rows; those that break a rule now carry its reason."""
    for row in rows:
        if row["reason"] is None:
            messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
            rejection = check_row(Row(messages, row["source"], row["line"]), max_chars)
            if rejection:
                row["reason"], row["detail"] = rejection.reason.value, rejection.detail
        yield row


def _quarantine_line(row: dict[str, Any]) -> str:
    fields = ("row_id", "source", "line", "reason", "detail", "raw")
    return json.dumps({name: row[name] for name in fields}, ensure_ascii=False) + "\n"


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The batch that expectations see. Rejected rows are in it, without text, so that their share can be judged."""
    kept = [row["messages"] if row["reason"] is None else [] for row in rows]
    prompts = ["\n".join(m["content"] for m in messages[:-1]) if messages else None for messages in kept]
    completions = [messages[-1]["content"] if messages else None for messages in kept]
    return pd.DataFrame(
        {
            "row_id": [row["row_id"] for row in rows],
            "source": [row["source"] for row in rows],
            "prompt": pd.Series(prompts, dtype="str"),
            "completion": pd.Series(completions, dtype="str"),
            "prompt_chars": [len(text or "") for text in prompts],
            "completion_chars": [len(text or "") for text in completions],
            "turns": [sum(m["role"] != "system" for m in messages) for messages in kept],
            "quarantined": [int(row["reason"] is not None) for row in rows],
        }
    )


def _problems(failed: list[Outcome], tally: _Tally, quarantine: Path) -> Iterator[Problem]:
    for item in failed:
        what = f"{item.name} {'could not be evaluated: ' + item.error if item.error else f'is {item.observed}'}"
        yield Problem(f"{what} ({item.why})", f"contract.suite, {item.severity}", item.limit, _act(item))
    if tally.reasons:
        reasons = "; ".join(
            f"{reason} {count} (first: {tally.examples[reason].strip()})"
            for reason, count in tally.reasons.most_common(5)
        )
        yield Problem(
            f"rejected rows by reason: {reasons}", str(quarantine), act="read them there, each with its reason"
        )


def _act(item: Outcome) -> str:
    """`{observed}` in a suite's act becomes a value that would have passed."""
    if not isinstance(item.observed, int | float):
        return item.act
    passing = item.observed if isinstance(item.observed, int) else math.ceil(item.observed * 100) / 100
    return item.act.replace("{observed}", str(passing))
