"""The files of a data set: the splits sorted by row, the duplicates, and everything in quarantine."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TextIO, get_args

import pyarrow.parquet as pq

from data_contracts.rows import Conversation, Reason, conversation_from_json
from tasks.data.curation.core.split import Split
from tasks.runtime.store import Store, content_key, digest, draft_folder, publish_draft

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
_BUCKETS: Final = "0123456789abcdef"  # first digit of the row id: a sixteenth of the rows is sorted in memory
_COLUMNS: Final = ["row_id", "source", "line", "messages", "slice", "cluster"]


@dataclass(frozen=True, slots=True)
class Kept:
    """The row is in a split."""

    split: Split


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The row is a copy of the row `of` (an id), and so belongs to its split, if that has one."""

    kind: Literal["exact", "near"]
    split: Split | None
    of: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The row is set aside for a reason. `near`: the id of the row, or the name of the item, that it is too near to."""

    reason: Reason
    near: str | None = None


Fate = Kept | Duplicate | Quarantined


class CuratedRow(NamedTuple):
    """A checked row and its fate."""

    row_id: str
    source: str
    line: int
    messages: Conversation
    slice: str | None
    cluster: str | None
    fate: Fate


def curated_rows(parts: list[Path], fates: Sequence[Fate]) -> Iterator[CuratedRow]:
    """Every checked row with its fate, part by part. fates: in the order of the parts' rows."""
    ordered = iter(fates)
    for part in parts:
        for row in pq.read_table(part, columns=_COLUMNS).to_pylist():
            place = (row["row_id"], row["source"], row["line"])
            messages = conversation_from_json(row["messages"])
            yield CuratedRow(*place, messages, row["slice"], row["cluster"], next(ordered))


def publish_dataset(store: Store, parts: list[Path], fates: Sequence[Fate], quarantine: Path) -> Path:
    """Write every row where it belongs; lines are sorted, so that the order of the sources means nothing."""
    names = [*(f"{split}.jsonl" for split in SPLITS), "duplicates.jsonl", "quarantine.jsonl"]
    with draft_folder(store, "datasets") as draft:
        with ExitStack() as stack:
            files = {
                (name, bucket): stack.enter_context((draft / f"{name}.{bucket}").open("w+", encoding="utf-8"))
                for name in names
                for bucket in _BUCKETS
            }
            for row in curated_rows(parts, fates):
                name, fields = _line(row)
                files[name, row.row_id[0]].write(json.dumps(fields, ensure_ascii=False) + "\n")
            with quarantine.open(encoding="utf-8") as rejected:
                for text in rejected:
                    files["quarantine.jsonl", json.loads(text)["row_id"][0]].write(text)
            for name in names:
                _merge(draft / name, [files[name, bucket] for bucket in _BUCKETS])
        key = content_key(*(digest(draft / name) for name in names))
        return publish_draft(store, "datasets", draft, names, key)


def _line(row: CuratedRow) -> tuple[str, dict[str, Any]]:
    """The file a row goes to, and its fields there."""
    place = {"row_id": row.row_id, "source": row.source, "line": row.line}
    messages = [message._asdict() for message in row.messages]
    match row.fate:
        case Kept(split):
            named = {"slice": row.slice, "cluster": row.cluster}
            part = {name: value for name, value in named.items() if value is not None}
            return f"{split}.jsonl", {**place, **part, "messages": messages}
        case Duplicate(kind, _, original):
            return "duplicates.jsonl", {**place, "kind": kind, "duplicate_of": original}
        case Quarantined(reason, near):
            detail = f"row {near[:12]}" if near else ""
            raw = json.dumps(messages, ensure_ascii=False)
            return "quarantine.jsonl", {**place, "reason": reason.value, "detail": detail, "raw": raw}


def _merge(path: Path, buckets: list[TextIO]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for bucket in buckets:
            bucket.seek(0)
            out.writelines(sorted(bucket))
