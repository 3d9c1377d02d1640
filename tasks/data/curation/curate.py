"""Stage 3: duplicates leave, the rest is split for ever, and every row's fate goes into the ledger."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.data_reports import CheckedRows, DatasetManifest, FileRef, ValidatedData
from data_contracts.data_spec import CurateSpec
from data_contracts.errors import DataError, Problem
from data_contracts.rows import Action, Reason
from tasks.data.curation.core.groups import cluster_key, join
from tasks.data.curation.core.minhash import near_pairs, similar
from tasks.data.curation.core.near_duplicates import (
    BRIDGES,
    DUPLICATE,
    KEPT,
    NEAR_TEST,
    Rows,
    badness,
    settle_exact,
    settle_near,
)
from tasks.data.curation.core.split import Fractions, Known, Split, assign_splits
from tasks.data.curation.dataset_files import SPLITS, Decision, items, publish_dataset
from tasks.data.curation.decontaminate import contaminated
from tasks.data.curation.row_ledger import Entry, HeldOut, exclusive, held_out, known_clusters, known_splits, record
from tasks.data.curation.signatures import Signatures, sign, sign_part
from tasks.runtime.fingerprint import code_digest, library_versions
from tasks.runtime.partitions import Job, map_parts
from tasks.runtime.store import Store, content_key

_FACT_WORDS: Final = 4  # a shorter answer is a label
_FACT_ROWS: Final = 10  # a more frequent one is boilerplate
_QUALITY: Final = ("flags", "repairs", "completion_chars")  # what `badness` takes
_REASONS: Final = {NEAR_TEST: Reason.NEAR_TEST_ITEM, BRIDGES: Reason.BRIDGES_SPLITS}


class _Index(NamedTuple):
    """All rows of the data, then the held-out rows that only the ledger knows, as ids and numbers."""

    rows: Rows
    signs: Signatures
    here: int  # how many rows are in the data
    clusters: list[str | None]  # of these, by the user's own field


def curate(
    store: Store, validated: ValidatedData, curate: CurateSpec, scope: str,
    contradictions: Action = "flag", benchmarks: FileRef | None = None, engine: str = "local",
) -> DatasetManifest:  # fmt: skip
    """Drop duplicates and split the rest; `scope` is the model whose ledger keeps rows in their split.

    `benchmarks`: JSONL with the texts of further benchmark items. Each cluster of copies keeps one row. Files are
    published first, then the ledger is written in one transaction: a crash between the two repeats the same work with
    the same result.
    """
    parts = [store.path(ref) for ref in validated.kept]
    with exclusive(store), tempfile.TemporaryDirectory() as scratch:
        known, before = known_splits(store, scope), held_out(store, scope)
        index = _index(_sign(store, validated, curate, engine), parts, known, before, curate, Path(scratch))
        decisions, clusters = _decide(index, known_clusters(store, scope), curate)
        _check_copies(decisions, curate.max_near_duplicate_rate)
        conflicts = _contradict(index, decisions, contradictions)
        held = list(_held_out_now(parts, decisions))
        hits = contaminated(parts, decisions, held, before, store.path(benchmarks) if benchmarks else None, curate)
        _check_sum(validated, decisions)
        folder = publish_dataset(store, parts, decisions, store.path(validated.quarantine))
        entries = _entries(index.rows.ids, decisions, folder / "quarantine.jsonl")
        record(store, scope, validated.snapshot_id, entries, held, validated.profile, clusters)
    known_rows = sum(d.fate == "kept" and i in known for d, i in zip(decisions, index.rows.ids, strict=False))
    flags = validated.flags | ({Reason.CONTRADICTION.value: conflicts} if conflicts else {})
    return _manifest(store, validated, folder, decisions, known_rows, flags, hits)


# --- what is compared ---------------------------------------------------------------------------------------


def _sign(store: Store, validated: ValidatedData, curate: CurateSpec, engine: str) -> list[Path]:
    settings = {"size": curate.shingle_words, "threshold": curate.near_duplicate_threshold}
    made_by = (code_digest(("tasks.data.curation.signatures",)), json.dumps([settings, library_versions(("rensa",))]))
    jobs = [
        Job(content_key(ref.sha256, *made_by)[:32], {**settings, "part": str(store.path(ref).resolve())})
        for ref in validated.kept
    ]
    return map_parts(store, "signed", sign_part, jobs, engine)


def _index(
    signed: list[Path], parts: list[Path], known: dict[str, Known], before: list[HeldOut], curate: CurateSpec,
    scratch: Path,
) -> _Index:  # fmt: skip
    facts = pa.concat_tables(pq.read_table(part, columns=["row_id", "cluster", *_QUALITY]) for part in parts)
    ids = facts["row_id"].to_pylist()
    here = set(ids)
    gone = [row for row in before if row.row_id not in here]
    sign([row.messages for row in gone], curate.shingle_words, curate.near_duplicate_threshold, scratch)
    every = [*ids, *(row.row_id for row in gone)]
    absent = np.arange(len(every)) >= len(ids)
    worse = np.concatenate([badness(*(facts[name].to_numpy() for name in _QUALITY)), np.zeros(len(gone), np.int64)])
    rows = Rows(every, [known.get(i) for i in every], absent, worse)
    return _Index(rows, Signatures([*signed, scratch]), len(ids), facts["cluster"].to_pylist())


# --- what becomes of each row -------------------------------------------------------------------------------


def _decide(index: _Index, known: dict[str, Split], curate: CurateSpec) -> tuple[list[Decision], dict[str, Split]]:
    """A decision for every row of the data, in order, and the split of every cluster. known: that of clusters before."""
    rows, signs = index.rows, index.signs
    exact = settle_exact(signs.contents, rows)
    firsts = np.flatnonzero((exact.codes == KEPT) | ((exact.of == np.arange(len(rows.ids))) & rows.absent))
    near = settle_near(_near_pairs(signs, firsts, curate.near_duplicate_threshold), rows.take(firsts))
    of = {int(first): int(firsts[near.of[place]]) for place, first in enumerate(firsts.tolist())}
    code = {int(first): int(near.codes[place]) for place, first in enumerate(firsts.tolist())}
    kept = [first for first in code if code[first] == KEPT]
    held_out_rows = [first for first in code if rows.absent[first]]
    originals = [of[int(first)] for first in exact.of[: index.here]]
    splits, clusters = _split(index, kept, held_out_rows, originals, known, curate)
    torn = set(kept) - splits.keys()
    decisions = []
    for row in range(index.here):
        first = int(exact.of[row])
        other = rows.ids[of[first]] if code[first] != KEPT else rows.ids[first]
        if of[first] in torn:
            decisions.append(Decision("quarantined", Reason.BRIDGES_SPLITS.value, None, None))
        elif code[first] in _REASONS:
            decisions.append(Decision("quarantined", _REASONS[code[first]].value, None, other))
        elif code[first] == DUPLICATE or row != first:
            original = rows.known[of[first]]
            split = splits.get(of[first]) or (original.split if original else None)
            decisions.append(Decision("duplicate", "exact" if row != first else "near", split, other))
        else:
            decisions.append(Decision("kept", None, splits[row], None))
    return decisions, clusters


def _near_pairs(signs: Signatures, firsts: Any, threshold: float) -> Any:
    """Pairs of places in `firsts` whose texts and whose answers are near copies."""
    if threshold >= 1.0 or len(firsts) < 2:
        return np.zeros((0, 2), np.int64)
    pairs = near_pairs(signs.bands[firsts], lambda places: signs.texts(firsts[places]), threshold)
    # A long passage would swallow the short questions asked about it: the answers must be near as well.
    return pairs[similar(pairs, lambda places: signs.answers(firsts[places]), threshold)]


def _split(
    index: _Index, kept: list[int], gone: list[int], originals: list[int], before: dict[str, Split], curate: CurateSpec
) -> tuple[dict[int, Split], dict[str, Split]]:
    """The split of kept rows by their place, without those that would tie two splits together; and that of every cluster.

    Rows that teach the same answer stay together, also with held-out rows now gone, and so do those of a cluster.
    originals: for each row of the data the place of the one it is a copy of or lies near to, else its own.
    """
    ids = index.rows.ids
    rows = _keys(index, kept, gone)
    known = {ids[row]: found for row in [*kept, *gone] if (found := index.rows.known[row])}
    now = {name: cluster_key(name) for name in sorted(set(filter(None, index.clusters)))}
    known |= {f"{now[name]} before": Known(before[name], True) for name in now.keys() & before.keys()}
    others = _copies(index, originals, rows) | {key: (key,) for key in now.values()}
    others |= {f"{now[name]} before": (now[name],) for name in now.keys() & before.keys()}
    groups, _ = join(rows | others, known)
    fractions = Fractions(
        curate.test_fraction, curate.max_test_rows, curate.validation_fraction, curate.max_validation_rows
    )
    splits = assign_splits(groups, known, fractions, {ids[row] for row in gone} | others.keys())
    placed = {row: splits[ids[row]] for row in kept if ids[row] in splits}
    return placed, {name: splits[key] for name, key in now.items()}


def _copies(index: _Index, originals: list[int], keys: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Ties the cluster of a copy that leaves to the row that it is a copy of."""
    ids = index.rows.ids
    return {
        f"copy {ids[row]} {name}": (cluster_key(name), keys[ids[original]][0])
        for row, (original, name) in enumerate(zip(originals, index.clusters, strict=True))
        if name and original != row and ids[original] in keys
    }


def _keys(index: _Index, kept: list[int], gone: list[int]) -> dict[str, tuple[str, ...]]:
    """What each row shares with others: its answer, its cluster; a row that shares nothing has its own name.

    Answers of few words are labels and very frequent ones boilerplate: knowing them is no leak.
    """
    rows, signs = index.rows, index.signs
    frequency = Counter(signs.answers_equal[kept].tolist())
    keys: dict[str, tuple[str, ...]] = {}
    for row in [*kept, *gone]:
        answer = int(signs.answers_equal[row])
        fact = signs.answer_words[row] >= _FACT_WORDS and frequency[answer] <= _FACT_ROWS
        cluster = index.clusters[row] if row < index.here else None
        own = (f"answer {answer}",) if fact else () if cluster else (rows.ids[row],)
        keys[rows.ids[row]] = (*own, cluster_key(cluster)) if cluster else own
    return keys


def _contradict(index: _Index, decisions: list[Decision], action: Action) -> int:
    """Kept rows that answer a prompt which another kept row answers differently: counted, or put in quarantine."""
    if action == "off":
        return 0
    kept = np.array([row for row, decision in enumerate(decisions) if decision.fate == "kept"], np.int64)
    prompts, counts = np.unique(index.signs.prompts[kept], return_counts=True)
    often = set(prompts[counts > 1].tolist())
    found = [row for row in kept.tolist() if int(index.signs.prompts[row]) in often]
    if action == "quarantine":
        for row in found:
            decisions[row] = Decision("quarantined", Reason.CONTRADICTION.value, None, None)
        return 0
    return len(found)


# --- what is told -------------------------------------------------------------------------------------------


def _check_sum(validated: ValidatedData, decisions: list[Decision]) -> None:
    fates = Counter(decision.fate for decision in decisions)
    quarantined = validated.rows_in - validated.rows_kept + fates["quarantined"]
    if validated.rows_in != fates["kept"] + quarantined + fates["duplicate"]:
        raise AssertionError(
            f"{validated.rows_in} rows in, {fates['kept']} kept + {quarantined} quarantined "
            f"+ {fates['duplicate']} duplicates"
        )


def _check_copies(decisions: list[Decision], most: float) -> None:
    """Raise DataError if more of the distinct rows are near copies than the contract allows."""
    kinds = Counter(decision.reason for decision in decisions if decision.fate == "duplicate")
    distinct = len(decisions) - kinds["exact"]
    rate = kinds["near"] / max(distinct, 1)
    if rate > most:
        what = f"{kinds['near']:,} of {distinct:,} distinct rows are near copies of others ({rate:.1%})"
        act = f"vary the templates that made them, or --set curate.max_near_duplicate_rate={rate:.2f}"
        raise DataError(Problem(what, "curate.max_near_duplicate_rate", f"{most:.1%}", act))


def _entries(ids: Any, decisions: list[Decision], quarantine: Path) -> Iterator[Entry]:
    """Kept rows first: of two entries of one id the ledger takes the first."""
    for fate in ("kept", "duplicate"):
        for row_id, decision in zip(ids, decisions, strict=False):
            if decision.fate == fate:
                yield Entry(row_id, fate, decision.reason, decision.split)
    with quarantine.open(encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            yield Entry(item["row_id"], "quarantined", item["reason"], None)


def _held_out_now(parts: list[Path], decisions: list[Decision]) -> Iterator[HeldOut]:
    for item in items(parts, decisions):
        split = item.decision.split
        if item.decision.fate == "kept" and split and split != "train":
            yield HeldOut(item.row_id, split, item.messages)


def _manifest(
    store: Store, validated: ValidatedData, folder: Path, decisions: list[Decision], known_rows: int,
    flags: dict[str, int], hits: dict[str, int],
) -> DatasetManifest:  # fmt: skip
    fates = Counter(decision.fate for decision in decisions)
    kinds = Counter(decision.reason for decision in decisions if decision.fate == "duplicate")
    added = Counter(decision.reason for decision in decisions if decision.fate == "quarantined")
    splits = Counter(decision.split for decision in decisions if decision.fate == "kept")
    refs = {split: store.ref(folder / f"{split}.jsonl") for split in SPLITS}
    carried = {name: getattr(validated, name) for name in CheckedRows.model_fields}
    carried["flags"] = flags
    carried["reasons"] = dict((Counter(validated.reasons) + added).most_common())
    return DatasetManifest(
        **carried,
        kept=fates["kept"],
        quarantined=validated.rows_in - validated.rows_kept + fates["quarantined"],
        duplicates=fates["duplicate"],
        exact_duplicates=kinds["exact"],
        near_duplicates=kinds["near"],
        splits={split: splits[split] for split in SPLITS},
        known_rows=known_rows,
        contamination=hits,
        **refs,
        quarantine=store.ref(folder / "quarantine.jsonl"),
        duplicate_rows=store.ref(folder / "duplicates.jsonl"),
    )
