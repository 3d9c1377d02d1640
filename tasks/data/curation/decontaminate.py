"""Training rows that share most of a held-out or benchmark item leave training: what is measured was not trained on.

Tulu 3 (arXiv 2411.15124): an item is hit if more than half of its words lie in 8-grams shared with one training row.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_contracts.data_spec import CurateSpec
from data_contracts.rows import Reason
from tasks.data.curation.core.contamination import Detector
from tasks.data.curation.dataset_files import Decision, Item, items
from tasks.data.curation.row_ledger import HeldOut

_BATCH_ROWS = 20_000


class _Measured(NamedTuple):
    """An item that is measured: the split or benchmark it belongs to, its name, and its text."""

    kind: str
    name: str
    text: str


def contaminated(
    parts: list[Path], decisions: list[Decision], held: list[HeldOut], before: list[HeldOut], benchmarks: Path | None,
    curate: CurateSpec,
) -> dict[str, int]:  # fmt: skip
    """Put contaminated training rows in quarantine (in `decisions`); answer with their number by what they hit.

    `any_13_gram` counts training rows that share a 13-gram with an item, the older and wider rule of GPT-3
    (arXiv 2005.14165), for comparison only.
    """
    if not curate.decontaminate:
        return {}
    measured = _measured(held, before, benchmarks)
    detector = Detector([item.text for item in measured])
    for rows in _training(parts, decisions):
        detector.count([text for _, text in rows])
    found: Counter[str] = Counter()
    for rows in _training(parts, decisions):
        result = detector.check([text for _, text in rows])
        found["any_13_gram"] += len(result.any_shared)
        hit_by_row = {hit.row: hit for hit in result.hits}
        for row, hit in hit_by_row.items():
            item = measured[hit.item]
            found[item.kind] += 1
            decisions[rows[row][0]] = Decision("quarantined", Reason.CONTAMINATED.value, None, item.name)
    return dict(found)


def _measured(held: list[HeldOut], before: list[HeldOut], benchmarks: Path | None) -> list[_Measured]:
    names = {row.row_id for row in held}
    rows = [*held, *(row for row in before if row.row_id not in names)]
    measured = [_Measured(row.split, row.row_id, _text(row)) for row in rows]
    if benchmarks:
        with benchmarks.open(encoding="utf-8") as lines:
            measured += [_Measured(**json.loads(line)) for line in lines]
    return measured


def _training(parts: list[Path], decisions: list[Decision]) -> Iterator[list[tuple[int, str]]]:
    """Batches of training rows: place among all rows, and text."""
    rows = (
        (place, _text(item))
        for place, item in enumerate(items(parts, decisions))
        if item.decision.fate == "kept" and item.decision.split == "train"
    )
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _text(item: Item | HeldOut) -> str:
    return " ".join(message.content for message in item.messages)
