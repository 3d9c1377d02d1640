"""Rows that are split as a run splits them, without files of a user."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.data_reports import DatasetManifest, Drift, FileRef, ValidatedData
from data_contracts.data_spec import CurateSpec
from data_contracts.rows import Message, content_id, conversation_as_json
from tasks.data.curation.curate import Curation, curate_rows
from tasks.data.validation.core.row_hashes import answer_hash, content_hash
from tasks.runtime.store import Store

WORDS = [f"word{i}" for i in range(20)]
NOWHERE = FileRef(path="none", sha256="0")


def facts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct questions and answers without words in common worth mentioning."""
    draw = random.Random(seed)
    return [
        (f"What is item {seed}-{i}?", " ".join(draw.choices(WORDS, k=12)) + f" {seed} {i}") for i in range(count)
    ]  # fmt: skip


def validated(store: Store, rows: Sequence[tuple[str, ...]], quarantined: int = 0) -> ValidatedData:
    """Rows are question, answer and, if they belong to one, a cluster."""
    folder = store.files / "validated" / content_id(tuple(Message("user", "\0".join(row)) for row in rows))
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for line, (prompt, answer, *cluster) in enumerate(rows, start=1):
        messages = (Message("user", prompt), Message("assistant", answer))
        place = {
            "row_id": content_id(messages),
            "source": "a.jsonl",
            "line": line,
            "messages": conversation_as_json(messages),
        }
        quality = {
            "flags": 0,
            "repairs": 0,
            "slice": None,
            "cluster": cluster[0] if cluster else None,
            "completion_chars": len(answer),
        }
        hashes = {"content_hash": content_hash(messages), "answer_hash": answer_hash(messages)}
        items.append({**place, **hashes, **quality})
    pq.write_table(pa.Table.from_pylist(items[: len(items) // 2]), folder / "kept-0.parquet")
    pq.write_table(pa.Table.from_pylist(items[len(items) // 2 :]), folder / "kept-1.parquet")
    bad = [{"row_id": f"{i}bad", "reason": "empty_answer"} for i in range(quarantined)]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(item) + "\n" for item in bad))
    (folder / "profile.json").write_text("{}")
    return ValidatedData(
        snapshot_id=folder.name,
        kept=[store.ref(folder / f"kept-{i}.parquet") for i in range(2)],
        quarantine=store.ref(folder / "quarantine.jsonl"),
        rows_in=len(rows) + quarantined,
        rows_kept=len(rows),
        reasons={"empty_answer": quarantined} if quarantined else {},
        flags={},
        repairs={},
        languages={},
        drift=Drift(reference=None, values={}),
        profile=store.ref(folder / "profile.json"),
        contract_result=NOWHERE,
        data_docs="none",
    )


def run(store: Store, rows: Sequence[tuple[str, ...]], quarantined: int = 0, **spec: Any) -> DatasetManifest:
    return curate_rows(store, validated(store, rows, quarantined), Curation(CurateSpec(**spec), "model"))
