"""Stage 3: duplicates are removed, the rest gets a permanent split, and every row's fate is recorded in the ledger.

A row has one place throughout (see copies.py). Everything about rows is a column by place, and every step answers with
new columns: which row stands for its copies, then splits, then fates.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from data_contracts.data_reports import CheckedRows, DatasetManifest, FileRef, ValidatedData
from data_contracts.data_spec import CurateSpec
from data_contracts.errors import DataError, Problem
from data_contracts.rows import Action, Reason
from tasks.data.curation.copies import ComparedData, Earlier, RowCopies, load_compared, resolve_copies, sign_parts
from tasks.data.curation.core.groups import Cluster, Key, SameAnswer, join
from tasks.data.curation.core.near_duplicates import CopyState, Ints
from tasks.data.curation.core.split import Fractions, Known, Split, assign_splits
from tasks.data.curation.dataset_files import (
    SPLITS,
    Duplicate,
    Fate,
    Kept,
    Quarantined,
    curated_rows,
    publish_dataset,
)
from tasks.data.curation.decontaminate import Contaminated, contaminated_rows, measured_items
from tasks.data.curation.row_ledger import (
    CuratedBatch,
    HeldOut,
    LedgerEntry,
    held_out,
    known_clusters,
    known_splits,
    ledger_lock,
    record_batch,
)
from tasks.data.curation.signatures import Shingling
from tasks.runtime.store import Store

_FACT_WORDS: Final = 4  # a shorter answer is a label
_FACT_ROWS: Final = 10  # a more frequent one is boilerplate
_KEPT: Final[dict[Split, Kept]] = {split: Kept(split) for split in SPLITS}  # shared: there may be millions


@dataclass(frozen=True)
class Curation:
    """How a model's data are curated."""

    spec: CurateSpec
    scope: str  # the model whose ledger keeps rows in their split
    contradictions: Action = "flag"
    benchmarks: FileRef | None = None  # JSONL with the texts of further benchmark items

    @property
    def shingling(self) -> Shingling:
        return Shingling(self.spec.shingle_words, self.spec.near_duplicate_threshold)


def curate_rows(store: Store, validated: ValidatedData, curation: Curation, engine: str = "local") -> DatasetManifest:
    """Drop duplicates and split the rest. Each cluster of copies keeps one row.

    Files are published first, then the ledger is written in one transaction: a crash between the two repeats the same
    work with the same result.
    """
    spec, scope = curation.spec, curation.scope
    parts = [store.path(ref) for ref in validated.kept]
    with ledger_lock(store), tempfile.TemporaryDirectory() as scratch:
        earlier = Earlier(known_splits(store, scope), held_out(store, scope), known_clusters(store, scope))
        signed = sign_parts(store, validated, curation.shingling, engine)
        data = load_compared(parts, signed, earlier, curation.shingling, Path(scratch))
        copies = resolve_copies(data, spec.near_duplicate_threshold)
        placed = _split(data, copies, earlier.clusters, spec)
        fates = _fates(data, copies, placed.rows)
        _check_copies(fates, spec.max_near_duplicate_rate)
        fates, flagged = _contradictions(data.signatures.prompt_hashes, fates, curation.contradictions)
        held = list(_held_out_now(parts, fates))
        found = Contaminated({}, {})
        if spec.decontaminate:
            benchmarks = store.path(curation.benchmarks) if curation.benchmarks else None
            found = contaminated_rows(parts, fates, measured_items(held, earlier.held_out, benchmarks))
        fates = _replaced(fates, found.rows)
        _check_sum(validated, fates)
        folder = publish_dataset(store, parts, fates, store.path(validated.quarantine))
        entries = _entries(data.ids, fates, folder / "quarantine.jsonl")
        batch = CuratedBatch(validated.snapshot_id, entries, held, validated.profile, placed.clusters)
        record_batch(store, scope, batch)
    kept_before = sum(isinstance(fate, Kept) and i in earlier.known for i, fate in zip(data.ids, fates, strict=True))
    return _manifest(store, validated, folder, _Found(fates, kept_before, flagged, found.counts))


# --- splits -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Copy:
    """A row that leaves: it ties its cluster to the row that it is a copy of."""

    row_id: str
    cluster: Cluster


@dataclass(frozen=True, slots=True)
class _KnownCluster:
    """A cluster of earlier batches: it holds the cluster in its split."""

    cluster: Cluster


_Member = str | _Copy | _KnownCluster | Cluster  # a row by its id, or what ties rows together


class _Placed(NamedTuple):
    """Splits of kept rows by place, without those that would tie two splits together, and of every cluster by name."""

    rows: dict[int, Split]
    clusters: dict[str, Split]


def _split(data: ComparedData, copies: RowCopies, before: Mapping[str, Split], spec: CurateSpec) -> _Placed:
    """Rows that teach the same answer stay together, also with held-out rows now gone, and so do those of a cluster.

    before: the splits of the clusters of earlier batches.
    """
    ids = data.rows.ids
    kept, gone = copies.places(CopyState.KEPT), copies.places(CopyState.ABSENT)
    rows = _keys(data, kept, gone)
    clusters = [Cluster(name) for name in sorted(set(filter(None, data.clusters)))]
    ties: dict[_Member, tuple[Key, ...]] = dict(_tied_by_copies(data, copies, rows))
    known: dict[_Member, Known] = {ids[row]: found for row in [*kept, *gone] if (found := copies.known[row])}
    for cluster in clusters:
        ties[cluster] = (cluster,)
        if cluster.name in before:
            ties[_KnownCluster(cluster)] = (cluster,)
            known[_KnownCluster(cluster)] = Known(before[cluster.name], kept=True)
    groups = join({**rows, **ties}, known).groups
    splits = assign_splits(groups, known, _fractions(spec), {ids[row] for row in gone} | ties.keys())
    placed = {row: splits[ids[row]] for row in kept if ids[row] in splits}
    return _Placed(placed, {cluster.name: splits[cluster] for cluster in clusters})


def _fractions(spec: CurateSpec) -> Fractions:
    return Fractions(spec.test_fraction, spec.max_test_rows, spec.validation_fraction, spec.max_validation_rows)


def _keys(data: ComparedData, kept: list[int], gone: list[int]) -> dict[_Member, tuple[Key, ...]]:
    """What each row shares with others, by id: its answer, its cluster; a row that shares nothing has its own id.

    Answers of few words are labels and very frequent ones boilerplate: knowing them is no leak.
    """
    signatures = data.signatures
    frequency = Counter(signatures.answer_hashes[kept].tolist())
    keys: dict[_Member, tuple[Key, ...]] = {}
    for row in [*kept, *gone]:
        answer = int(signatures.answer_hashes[row])
        is_fact = signatures.answer_words[row] >= _FACT_WORDS and frequency[answer] <= _FACT_ROWS
        name = data.clusters[row] if row < len(data.clusters) else None
        cluster = (Cluster(name),) if name else ()
        row_id = data.rows.ids[row]
        keys[row_id] = (SameAnswer(answer), *cluster) if is_fact else cluster or (row_id,)
    return keys


def _tied_by_copies(
    data: ComparedData, copies: RowCopies, keys: Mapping[_Member, tuple[Key, ...]]
) -> Iterator[tuple[_Copy, tuple[Key, ...]]]:
    """For each copy that has a cluster: that cluster, and the first key of the row that it is a copy of."""
    for row, (original, name) in enumerate(zip(copies.originals.tolist(), data.clusters, strict=False)):
        stays = data.rows.ids[original]
        if name and original != row and stays in keys:
            cluster = Cluster(name)
            yield _Copy(data.rows.ids[row], cluster), (cluster, keys[stays][0])


# --- fates --------------------------------------------------------------------------------------------------


def _fates(data: ComparedData, copies: RowCopies, splits: Mapping[int, Split]) -> list[Fate]:
    """The fate of every row of the data, in order."""
    torn = set(copies.places(CopyState.KEPT)) - splits.keys()
    columns = (column.tolist() for column in (copies.firsts, copies.states, copies.originals))
    fates: list[Fate] = []
    for row, first, state, original in zip(range(len(data.clusters)), *columns, strict=False):
        if original in torn:
            fates.append(Quarantined(Reason.BRIDGES_SPLITS))
        elif state == CopyState.NEAR_TEST:
            fates.append(Quarantined(Reason.NEAR_TEST_ITEM, near=data.rows.ids[original]))
        elif state == CopyState.BRIDGES:
            fates.append(Quarantined(Reason.BRIDGES_SPLITS, near=data.rows.ids[original]))
        elif state == CopyState.DUPLICATE or row != first:
            known = copies.known[original]
            split = splits.get(original) or (known.split if known else None)
            fates.append(Duplicate("exact" if row != first else "near", split, data.rows.ids[original]))
        else:
            fates.append(_KEPT[splits[row]])
    return fates


def _replaced(fates: list[Fate], others: Mapping[int, Fate]) -> list[Fate]:
    """The fates, with others at some places."""
    return [others.get(row, fate) for row, fate in enumerate(fates)] if others else fates


def _contradictions(prompts: Ints, fates: list[Fate], action: Action) -> tuple[list[Fate], int]:
    """Kept rows that answer a prompt which another kept row answers differently: the fates, and how many are flagged."""
    if action == "off":
        return fates, 0
    kept = np.array([row for row, fate in enumerate(fates) if isinstance(fate, Kept)], np.int64)
    _, inverse, counts = np.unique(prompts[kept], return_inverse=True, return_counts=True)
    found: list[int] = kept[counts[inverse] > 1].tolist()
    if action == "flag":
        return fates, len(found)
    return _replaced(fates, dict.fromkeys(found, Quarantined(Reason.CONTRADICTION))), 0


def _held_out_now(parts: list[Path], fates: Sequence[Fate]) -> Iterator[HeldOut]:
    for row in curated_rows(parts, fates):
        if isinstance(row.fate, Kept) and row.fate.split != "train":
            yield HeldOut(row.row_id, row.fate.split, row.messages)


def _check_copies(fates: Sequence[Fate], most: float) -> None:
    """Raise DataError if more of the distinct rows are near copies than the contract allows."""
    kinds = Counter(fate.kind for fate in fates if isinstance(fate, Duplicate))
    distinct = len(fates) - kinds["exact"]
    rate = kinds["near"] / max(distinct, 1)
    if rate > most:
        what = f"{kinds['near']:,} of {distinct:,} distinct rows are near copies of others ({rate:.1%})"
        act = f"vary the templates that made them, or --set curate.max_near_duplicate_rate={rate:.2f}"
        raise DataError(Problem(what, "curate.max_near_duplicate_rate", f"{most:.1%}", act))


def _check_sum(validated: ValidatedData, fates: Sequence[Fate]) -> None:
    counts = Counter(type(fate) for fate in fates)
    quarantined = validated.rows_in - validated.rows_kept + counts[Quarantined]
    if validated.rows_in != counts[Kept] + quarantined + counts[Duplicate]:
        raise AssertionError(
            f"{validated.rows_in} rows in, {counts[Kept]} kept + {quarantined} quarantined "
            f"+ {counts[Duplicate]} duplicates"
        )


# --- what is recorded and reported --------------------------------------------------------------------------


def _entries(ids: Sequence[str], fates: Sequence[Fate], quarantine: Path) -> Iterator[LedgerEntry]:
    """Kept rows first: of two entries of one id the ledger takes the first."""
    for row_id, fate in zip(ids, fates, strict=True):
        if isinstance(fate, Kept):
            yield LedgerEntry(row_id, "kept", reason=None, split=fate.split)
    for row_id, fate in zip(ids, fates, strict=True):
        if isinstance(fate, Duplicate):
            yield LedgerEntry(row_id, "duplicate", fate.kind, fate.split)
    with quarantine.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield LedgerEntry(row["row_id"], "quarantined", row["reason"], split=None)


class _Found(NamedTuple):
    """What curation has found out."""

    fates: list[Fate]
    known_rows: int
    contradictions: int  # rows kept and flagged
    contamination: dict[str, int]


def _manifest(store: Store, validated: ValidatedData, folder: Path, found: _Found) -> DatasetManifest:
    splits = Counter(fate.split for fate in found.fates if isinstance(fate, Kept))
    kinds = Counter(fate.kind for fate in found.fates if isinstance(fate, Duplicate))
    added = Counter(fate.reason.value for fate in found.fates if isinstance(fate, Quarantined))
    flags = {Reason.CONTRADICTION.value: found.contradictions} if found.contradictions else {}
    carried = {name: getattr(validated, name) for name in CheckedRows.model_fields}
    carried["flags"] = validated.flags | flags
    carried["reasons"] = dict((Counter(validated.reasons) + added).most_common())
    refs = {split: store.ref(folder / f"{split}.jsonl") for split in SPLITS}
    return DatasetManifest(
        **carried,
        kept=splits.total(),
        quarantined=validated.rows_in - validated.rows_kept + added.total(),
        duplicates=kinds.total(),
        exact_duplicates=kinds["exact"],
        near_duplicates=kinds["near"],
        splits={split: splits[split] for split in SPLITS},
        known_rows=found.known_rows,
        contamination=found.contamination,
        **refs,
        quarantine=store.ref(folder / "quarantine.jsonl"),
        duplicate_rows=store.ref(folder / "duplicates.jsonl"),
    )
