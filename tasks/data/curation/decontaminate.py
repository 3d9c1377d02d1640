"""Training rows that share most of a held-out or benchmark item leave training: what is measured was not trained on.

Tulu 3 (arXiv 2411.15124): an item is hit if more than half of its words are in 8-grams shared with one training row.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_contracts.rows import Reason
from tasks.data.curation.core.contamination import Detector
from tasks.data.curation.dataset_files import CuratedRow, Fate, Kept, Quarantined, curated_rows
from tasks.data.curation.row_ledger import HeldOut

_BATCH_ROWS = 20_000
_TRAINS = Kept("train")


class MeasuredItem(NamedTuple):
    """An item that is measured: the split or benchmark it belongs to, its name, and its text."""

    kind: str
    name: str
    text: str


class Contaminated(NamedTuple):
    """Training rows that hold most of an item, and how many rows hit what.

    `any_13_gram` counts training rows that share a 13-gram with an item, the older and wider rule of GPT-3
    (arXiv 2005.14165), for comparison only.
    """

    rows: dict[int, Quarantined]  # by place among all rows
    counts: dict[str, int]


def measured_items(held: list[HeldOut], before: list[HeldOut], benchmarks: Path | None) -> list[MeasuredItem]:
    """Rows held out now, those that only earlier batches held out, and the items of a JSONL file."""
    now = {row.row_id for row in held}
    rows = [*held, *(row for row in before if row.row_id not in now)]
    items = [MeasuredItem(row.split, row.row_id, _text(row)) for row in rows]
    if benchmarks:
        with benchmarks.open(encoding="utf-8") as lines:
            items += [MeasuredItem(**json.loads(line)) for line in lines]
    return items


def contaminated_rows(parts: list[Path], fates: Sequence[Fate], items: list[MeasuredItem]) -> Contaminated:
    """Which training rows share most of an item; the rows are read twice, in batches."""
    detector = Detector([item.text for item in items])
    for batch in _training(parts, fates):
        detector.count([text for _, text in batch])
    rows: dict[int, Quarantined] = {}
    counts: Counter[str] = Counter()
    for batch in _training(parts, fates):
        result = detector.check([text for _, text in batch])
        counts["any_13_gram"] += len(result.any_shared)
        last_hits = {hit.row: hit for hit in result.hits}
        for row, hit in last_hits.items():
            item = items[hit.item]
            counts[item.kind] += 1
            rows[batch[row][0]] = Quarantined(Reason.CONTAMINATED, near=item.name)
    return Contaminated(rows, dict(counts))


def _training(parts: list[Path], fates: Sequence[Fate]) -> Iterator[list[tuple[int, str]]]:
    """Batches of training rows: place among all rows, and text."""
    rows = ((place, _text(row)) for place, row in enumerate(curated_rows(parts, fates)) if row.fate == _TRAINS)
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _text(row: CuratedRow | HeldOut) -> str:
    return " ".join(message.content for message in row.messages)
