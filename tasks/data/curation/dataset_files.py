"""The files of a data set: the splits sorted by row, the duplicates, and everything in quarantine."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO, get_args

import pyarrow.parquet as pq

from data_contracts.data_reports import FileRef
from data_contracts.rows import Message, from_json
from tasks.data.curation.core.split import Split
from tasks.runtime.store import Store, content_key, digest, draft_folder, publish_draft

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
_BUCKETS: Final = "0123456789abcdef"  # first digit of the row id: a sixteenth of the rows is sorted in memory


_COLUMNS: Final = ["row_id", "source", "line", "messages", "slice", "cluster"]


class Decision(NamedTuple):
    """What becomes of one row: kept in a split, a duplicate (exact or near) of a row, or in quarantine for a reason."""

    fate: str  # kept, duplicate, quarantined
    reason: str | None
    split: Split | None
    of: str | None  # row_id of the row it is a copy of or lies near to


class Item(NamedTuple):
    """A checked row and its decision."""

    row_id: str
    source: str
    line: int
    messages: tuple[Message, ...]
    slice: str | None
    cluster: str | None
    decision: Decision


def items(parts: list[Path], decisions: list[Decision]) -> Iterator[Item]:
    """Every checked row with its decision, part by part."""
    numbered = iter(decisions)
    for part in parts:
        for row in pq.read_table(part, columns=_COLUMNS).to_pylist():
            place = (row["row_id"], row["source"], row["line"])
            yield Item(*place, from_json(row["messages"]), row["slice"], row["cluster"], next(numbered))


def publish_dataset(store: Store, parts: list[Path], decisions: list[Decision], quarantine: Path) -> Path:
    """Write every row where it belongs; lines are sorted, so that the order of the sources means nothing."""
    names = [*(f"{split}.jsonl" for split in SPLITS), "duplicates.jsonl", "quarantine.jsonl"]
    with draft_folder(store, "datasets") as draft:
        with ExitStack() as stack:
            files = {
                (name, bucket): stack.enter_context((draft / f"{name}.{bucket}").open("w+", encoding="utf-8"))
                for name in names
                for bucket in _BUCKETS
            }
            for item in items(parts, decisions):
                name, told = _line(item)
                files[name, item.row_id[0]].write(json.dumps(told, ensure_ascii=False) + "\n")
            with quarantine.open(encoding="utf-8") as rejected:
                for text in rejected:
                    files["quarantine.jsonl", json.loads(text)["row_id"][0]].write(text)
            for name in names:
                _merge(draft / name, [files[name, bucket] for bucket in _BUCKETS])
        key = content_key(*(digest(draft / name) for name in names))
        return publish_draft(store, "datasets", draft, names, key)


def _line(item: Item) -> tuple[str, dict[str, Any]]:
    """The file a row goes to and what stands there."""
    place = {"row_id": item.row_id, "source": item.source, "line": item.line}
    fate, reason, split, of = item.decision
    messages = [message._asdict() for message in item.messages]
    if fate == "kept":
        named = {"slice": item.slice, "cluster": item.cluster}
        part = {name: value for name, value in named.items() if value is not None}
        return f"{split}.jsonl", {**place, **part, "messages": messages}
    if fate == "duplicate":
        return "duplicates.jsonl", {**place, "kind": reason, "duplicate_of": of}
    detail = f"row {of[:12]}" if of else ""
    raw = json.dumps(messages, ensure_ascii=False)
    return "quarantine.jsonl", {**place, "reason": reason, "detail": detail, "raw": raw}


def _merge(path: Path, buckets: list[TextIO]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for bucket in buckets:
            bucket.seek(0)
            out.writelines(sorted(bucket))


NAME = "trained_rows.txt"


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
        (folder / NAME).write_text(text, encoding="utf-8")
    return store.ref(store.files / "trained_rows" / content_key(text)[:32] / NAME)
