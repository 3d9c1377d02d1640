"""Stage 3: duplicates leave, the rest is split for ever, and every row's fate goes into the ledger."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import pyarrow.parquet as pq

from data_contracts.records import Message, Row
from data_contracts.reports import DatasetManifest, ValidatedData
from data_contracts.run_spec import CurateSpec
from tasks.core.dedup import answer_groups, exact_groups, near_groups
from tasks.core.split import Fractions, Known, Split, assign_splits, representative
from tasks.drafts import content_key, draft_folder, publish_draft
from tasks.ledger import Entry, known_splits, record
from tasks.stores import Store, digest

_SPLITS: Final[tuple[Split, ...]] = get_args(Split)


class _Duplicate(NamedTuple):
    row: "_Identified"
    kind: str  # exact or near
    of: str  # row_id of the row that stays


class _Identified(NamedTuple):
    """A row and its id, computed once."""

    row_id: str
    row: Row

    @property
    def order(self) -> tuple[str, str, int]:
        return self.row_id, self.row.source, self.row.line


class _Curated(NamedTuple):
    kept: list[_Identified]
    duplicates: list[_Duplicate]
    splits: dict[str, Split]  # of every kept row


def curate(store: Store, validated: ValidatedData, curate: CurateSpec, scope: str) -> DatasetManifest:
    """Drop duplicates and split the rest; `scope` is the model whose ledger keeps rows in their split.

    Each cluster of copies keeps one row. Files are published first, then the ledger is written in one transaction:
    a crash between the two repeats the same work with the same result.
    """
    known = known_splits(store, scope)
    result = _curate(_load(store.path(validated.kept)), known, curate)
    quarantined = validated.rows_in - validated.rows_kept
    if validated.rows_in != len(result.kept) + quarantined + len(result.duplicates):
        raise AssertionError(
            f"{validated.rows_in} rows in, {len(result.kept)} kept + {quarantined} quarantined "
            f"+ {len(result.duplicates)} duplicates"
        )
    folder = _publish(store, result)
    quarantine_file = store.path(validated.quarantine)
    record(store, scope, validated.snapshot_id, _entries(result, quarantine_file))
    exact = sum(duplicate.kind == "exact" for duplicate in result.duplicates)
    return DatasetManifest(
        snapshot_id=validated.snapshot_id,
        rows_in=validated.rows_in,
        kept=len(result.kept),
        quarantined=quarantined,
        duplicates=len(result.duplicates),
        exact_duplicates=exact,
        near_duplicates=len(result.duplicates) - exact,
        reasons=validated.reasons,
        splits={split: sum(s == split for s in result.splits.values()) for split in _SPLITS},
        known_rows=sum(row.row_id in known for row in result.kept),
        train=store.ref(folder / "train.jsonl"),
        validation=store.ref(folder / "validation.jsonl"),
        test=store.ref(folder / "test.jsonl"),
        quarantine=validated.quarantine,
        duplicate_rows=store.ref(folder / "duplicates.jsonl"),
        contract_result=validated.contract_result,
        data_docs=validated.data_docs,
    )


def _load(kept: Path) -> list[_Identified]:
    rows = []
    for batch in pq.ParquetFile(kept).iter_batches(10_000):
        for item in batch.to_pylist():
            messages = tuple(Message(m["role"], m["content"]) for m in item["messages"])
            rows.append(_Identified(item["row_id"], Row(messages, item["source"], item["line"])))
    return rows


def _curate(rows: list[_Identified], known: dict[str, Known], curate: CurateSpec) -> _Curated:
    duplicates: list[_Duplicate] = []
    firsts = _stand_ins(rows, exact_groups([row.row.messages for row in rows]), known, "exact", duplicates)
    clusters = near_groups([row.row.messages for row in firsts], curate.near_duplicate_threshold)
    kept = _stand_ins(firsts, clusters, known, "near", duplicates)
    fractions = Fractions(
        curate.test_fraction, curate.max_test_rows, curate.validation_fraction, curate.max_validation_rows
    )
    taught = answer_groups([row.row_id for row in kept], [row.row.messages for row in kept])
    splits = assign_splits(taught, known, fractions)
    return _Curated(kept, _resolved(duplicates, splits), splits)


def _stand_ins(
    rows: list[_Identified], groups: list[int], known: dict[str, Known], kind: str, duplicates: list[_Duplicate]
) -> list[_Identified]:
    """One row of each group, in order of id, whatever the order of the rows; the others go to `duplicates`."""
    members: dict[int, list[_Identified]] = defaultdict(list)
    for row, group in zip(rows, groups, strict=True):
        members[group].append(row)
    kept = []
    for group_rows in members.values():
        chosen_id = representative({row.row_id for row in group_rows}, known)
        chosen = min((row for row in group_rows if row.row_id == chosen_id), key=lambda row: row.order)
        kept.append(chosen)
        duplicates += [_Duplicate(row, kind, chosen_id) for row in group_rows if row is not chosen]
    return sorted(kept, key=lambda row: row.order)


def _resolved(duplicates: list[_Duplicate], splits: dict[str, Split]) -> list[_Duplicate]:
    """An exact copy of a row that then was a near copy of another points to the one that stayed."""
    near = {duplicate.row.row_id: duplicate.of for duplicate in duplicates if duplicate.kind == "near"}
    resolved = [d if d.of in splits else d._replace(of=near[d.of]) for d in duplicates]
    return sorted(resolved, key=lambda duplicate: duplicate.row.order)


def _publish(store: Store, result: _Curated) -> Path:
    with draft_folder(store, "datasets") as draft:
        lines = {f"{split}.jsonl": _row_lines(result, split) for split in _SPLITS}
        lines["duplicates.jsonl"] = map(_duplicate_line, result.duplicates)
        for name, content in lines.items():
            with (draft / name).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in content)
        key = content_key(*(digest(draft / name) for name in lines))
        return publish_draft(store, "datasets", draft, list(lines), key)


def _row_lines(result: _Curated, split: Split) -> Iterator[dict[str, Any]]:
    for row_id, row in result.kept:
        if result.splits[row_id] == split:
            messages = [message._asdict() for message in row.messages]
            yield {"row_id": row_id, "source": row.source, "line": row.line, "messages": messages}


def _duplicate_line(duplicate: _Duplicate) -> dict[str, Any]:
    row_id, row = duplicate.row
    return {
        "row_id": row_id, "source": row.source, "line": row.line, "kind": duplicate.kind, "duplicate_of": duplicate.of,
    }  # fmt: skip


def _entries(result: _Curated, quarantine: Path) -> Iterable[Entry]:
    """Kept rows first: of two entries of one id the ledger's first counts."""
    for row_id, _ in result.kept:
        yield Entry(row_id, "kept", None, result.splits[row_id])
    for duplicate in result.duplicates:
        yield Entry(duplicate.row.row_id, "duplicate", duplicate.kind, result.splits[duplicate.of])
    with quarantine.open(encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            yield Entry(item["row_id"], "quarantined", item["reason"], None)
