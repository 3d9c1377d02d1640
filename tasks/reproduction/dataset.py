"""Rebuild the rows of a registered version from its lineage: the snapshot, and the splits with the ledger as it was."""

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data_contracts.data_reports import DatasetManifest, FileRef, Snapshot, SourceFile
from data_contracts.data_spec import DataSpec
from data_contracts.errors import DataError, Problem, TunegateError
from data_contracts.lineage import Compared, DataLineage, Lineage
from data_contracts.rows import Reason, action_of
from data_contracts.run_spec import DOMAIN_TASKS, RunSpec
from tasks.data.curation import row_ledger as ledger
from tasks.data.curation.curate import Curation, curate_rows
from tasks.data.curation.dataset_files import SPLITS
from tasks.data.ingestion.ingest import ingest_sources, snapshot_id_of
from tasks.data.ingestion.sources import find_sources
from tasks.data.validation.validate import Checks, validate
from tasks.evaluation.evaluate import benchmark_items, task_files
from tasks.runtime.store import Store, digest

_SHOWN = 12


class RebuiltSplits(NamedTuple):
    """The recorded splits, at absolute paths. note: where they came from."""

    train: FileRef
    validation: FileRef
    test: FileRef
    note: str
    compared: list[Compared]


def rebuild_splits(
    store: Store, place: Store, spec: RunSpec, lineage: Lineage, recorded: DatasetManifest
) -> RebuiltSplits:
    """The splits that the version was trained and evaluated on, made in `place`. Raises DataError if they cannot be had.

    If other splits come out, or none, the recorded ones of the store are used, and the note says why.
    """
    snapshot, note = _snapshot(store, place, spec.data, lineage.data)
    compared = [
        *_sources(spec.data, lineage.data),
        Compared(what="snapshot", then=lineage.data.snapshot_id, now=snapshot.id),
    ]
    wanted: dict[str, str] = {split: getattr(lineage.data, f"{split}_sha256") for split in SPLITS}
    try:
        made = _split_again(store, place, spec, lineage, snapshot)
        found: dict[str, FileRef] = {split: getattr(made, split) for split in SPLITS}
        compared += _other_results(place, lineage, made)
    except TunegateError as error:
        found, note = {}, f"{note}; they could not be split again: {error.problems[0].what}"
    compared += [Compared(what=f"{name} split", then=wanted[name], now=ref.sha256) for name, ref in found.items()]
    if {name: ref.sha256 for name, ref in found.items()} == wanted:
        absolute = {name: ref.model_copy(update={"path": str(place.path(ref))}) for name, ref in found.items()}
        return RebuiltSplits(**absolute, note=f"{note}, split again with the ledger as of that run", compared=compared)
    return _recorded(store, recorded, wanted, f"{note}; the splits come from the store's own data set", compared)


def _other_results(place: Store, lineage: Lineage, made: DatasetManifest) -> list[Compared]:
    then = lineage.data
    fates = ledger.fates_sha256(place, lineage.name, then.snapshot_id)
    return [
        Compared(what=what, then=before, now=now, explains=False)
        for what, before, now in (
            ("result of the contract", then.contract_sha256, made.contract_result.sha256),
            ("fate of every row", then.ledger_sha256, fates),
        )
    ]


def _recorded(
    store: Store, recorded: DatasetManifest, wanted: dict[str, str], note: str, compared: list[Compared]
) -> RebuiltSplits:
    files = {name: store.files / getattr(recorded, name).path for name in SPLITS}
    wrong = [name for name, file in files.items() if not file.exists() or digest(file) != wanted[name]]
    if wrong:
        raise DataError(*(_no_split(files[name], wanted[name], note) for name in wrong))
    return RebuiltSplits(
        **{n: FileRef(path=str(file), sha256=wanted[n]) for n, file in files.items()}, note=note, compared=compared
    )


def _no_split(file: Path, wanted: str, note: str) -> Problem:
    found = f"sha256 {digest(file)[:_SHOWN]}" if file.exists() else "no file"
    what = f"{file.parent.name[:_SHOWN]}/{file.name} is not the split that was recorded ({found}), and cannot be made again"
    return Problem(what, "data", f"sha256 {wanted[:_SHOWN]}", f"restore it from a backup of the store ({note})")


# --- the snapshot -------------------------------------------------------------------------------------------


def _snapshot(store: Store, place: Store, data: DataSpec, then: DataLineage) -> tuple[Snapshot, str]:
    """The recorded snapshot: from the store if it is whole there, else from the sources again."""
    parts = sorted((store.files / "snapshots" / then.snapshot_id / "parts").glob("*.parquet"))
    found = _id_of(parts, then)
    if found == then.snapshot_id:
        files = [FileRef(path=str(part.resolve()), sha256=digest(part)) for part in parts]
        rows = [
            SourceFile(name=name, format="", rows=then.source_rows[name], sha256=sha256)
            for name, sha256 in then.sources.items()
        ]
        return Snapshot(id=found, parts=files, rows_in=then.rows_in, unreadable=0, sources=rows), "the store's snapshot"
    why = f"the store's snapshot is {found}"
    try:
        made = ingest_sources(place, data)
    except DataError as error:
        gone = Problem(f"the rows of the version are gone: {why}", "data", act=_act(then))
        raise DataError(gone, *error.problems) from error
    if made.id != then.snapshot_id:
        raise DataError(*_changed(made, then, why))
    return made, f"the sources read again ({why})"


def _id_of(parts: list[Path], then: DataLineage) -> str:
    if not parts:
        return "not there"
    try:
        found = snapshot_id_of(parts, list(then.source_rows.values()))
    except (pa.ArrowException, OSError):
        return "damaged"
    return found if found == then.snapshot_id else "changed"


def _changed(made: Snapshot, then: DataLineage, why: str) -> list[Problem]:
    """Every source that is not what it was."""
    now = {source.name: source.sha256 for source in made.sources}
    names = sorted(name for name in now | then.sources if now.get(name) != then.sources.get(name))
    differences = [
        f"{name}: sha256 {then.sources.get(name, 'none')[:_SHOWN]} then, {now.get(name, 'none')[:_SHOWN]} now"
        for name in names
    ]
    what = f"other rows come out of the sources than then, and {why}"
    return [
        Problem("; ".join([what, *differences]), "data.source", f"snapshot {then.snapshot_id[:_SHOWN]}", _act(then))
    ]


def _act(then: DataLineage) -> str:
    names = ", ".join(then.sources)
    return (
        f"restore store/snapshots/{then.snapshot_id[:_SHOWN]}... from a backup, or name {names}: --set data.source=PATH"
    )


def _sources(data: DataSpec, then: DataLineage) -> list[Compared]:
    """The files that are still where they were, by content. Builders and addresses are not read."""
    found, _ = find_sources(data.model_copy(update={"source": [s for s in data.source if "://" not in s]}))
    return [
        Compared(what=f"source {source.name}", then=then.sources[source.name], now=digest(source.path), explains=False)
        for source in found
        if source.kind == "file" and source.name in then.sources
    ]


# --- the splits ---------------------------------------------------------------------------------------------


def _split_again(store: Store, place: Store, spec: RunSpec, lineage: Lineage, snapshot: Snapshot) -> DatasetManifest:
    """As the stages validate and curate do, in a store of its own, with the ledger as it was before this batch."""
    scope = lineage.name
    ledger.copy_before(store, place, scope, snapshot.id, lineage.made_unix_seconds)
    released = [(row.row_id, row.reason) for row in ledger.releases(place, scope)]
    before = ledger.batch_before(place, scope, snapshot.id)
    if before:  # its profile is in the store
        before = (before[0], before[1].model_copy(update={"path": str(store.path(before[1]).resolve())}))
    validated = validate(place, snapshot, Checks(spec.rules, spec.contract, released), before)
    further = sorted(set(spec.evaluate.tasks) - set(DOMAIN_TASKS))
    wanted = further and spec.curate.decontaminate
    items = benchmark_items(place, further, task_files(spec.evaluate)) if wanted else None
    contradictions = action_of(Reason.CONTRADICTION, spec.rules.actions)
    return curate_rows(place, validated, Curation(spec.curate, scope, contradictions, items))
