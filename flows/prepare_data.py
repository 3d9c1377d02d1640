"""Raw rows to splits, alone or as the first stages of a retrain; rows back from quarantine."""

import json
from pathlib import Path

from prefect import flow

from data_contracts.data_reports import DatasetManifest, DataState, Snapshot
from data_contracts.errors import ConfigError, DataError, Problem
from data_contracts.reports import Stage
from data_contracts.rows import LEAKS, UNREADABLE, Reason, action_of
from data_contracts.run_spec import DOMAIN_TASKS, RunSpec
from data_contracts.stage_inputs import CurationInputs, ValidationInputs
from flows.runner import Stages, in_store
from flows.services.crashed_runs import hold
from tasks.data.curation import row_ledger as ledger
from tasks.data.curation.explain import write_data_state
from tasks.data.ingestion.sources import source_digests
from tasks.data.validation.validate import promised
from tasks.evaluation.evaluate import task_files
from tasks.pipeline import stages
from tasks.reporting import prefect_artifacts as artifacts
from tasks.runtime.store import Store


def prepare_data(spec: RunSpec, force: bool = False) -> tuple[DatasetManifest, list[Stage]]:
    """Ingest, validate and split only."""
    return in_store(prepare_data_flow, spec)(spec, force)


@flow(name="prepare-data", result_serializer="json", on_running=[hold])
def prepare_data_flow(spec: RunSpec, force: bool = False) -> tuple[DatasetManifest, list[Stage]]:
    """The data set and how each stage went."""
    run = Stages.of(spec, force=force)
    dataset = data_stages(run, spec)
    return run.end((dataset, run.done))


def data_stages(run: Stages, spec: RunSpec) -> DatasetManifest:
    """Raw rows to splits."""
    store = Store.of(spec.store)
    store.check_room()
    scope, engine = spec.model.name, spec.data.engine
    snapshot = ingested(run, store, spec)
    inputs = ValidationInputs(
        snapshot=snapshot,
        rules=spec.rules,
        contract=spec.contract,
        released=[(row.row_id, row.reason) for row in ledger.releases(store, scope)],
        reference=ledger.batch_before(store, scope, snapshot.id),
    )
    validated = run.run(stages.validate_stage, store, inputs, promised(spec.rules, spec.contract), engine)
    further = sorted(set(spec.evaluate.tasks) - set(DOMAIN_TASKS))
    wanted = further and spec.curate.decontaminate
    curation = CurationInputs(
        validated=validated,
        scope=scope,
        contradictions=action_of(Reason.CONTRADICTION, spec.rules.actions),
        benchmarks=run.run(stages.benchmarks_stage, store, further, task_files(spec.evaluate)) if wanted else None,
    )
    dataset = run.run(stages.curate_stage, store, curation, spec.curate, engine)
    artifacts.publish_data(store, dataset)
    write_data_state(store, scope, DataState(snapshot=snapshot, validated=validated, dataset=dataset))
    return dataset


def ingested(run: Stages, store: Store, spec: RunSpec) -> Snapshot:
    """The sources' rows as they are now."""
    return run.run(stages.ingest_stage, store, spec.data, source_digests(spec.data))


def release_quarantined(spec: RunSpec, reason: str, why: str, rows: list[str]) -> tuple[DatasetManifest, list[Stage]]:
    """Overrule `reason` for the quarantined rows whose id begins with one of `rows` (all, if none is given).

    Raises ConfigError if the reason cannot be overruled or no such row is there.
    """
    _check(reason, why)
    store = Store.of(spec.store)
    quarantine = _quarantine(spec, store)
    with quarantine.open(encoding="utf-8") as file:
        rejected = [(item["row_id"], item["reason"]) for item in map(json.loads, file)]
    found = [i for i, r in rejected if r == reason and (not rows or i.startswith(tuple(rows)))]
    if not found:
        there = ", ".join(sorted({r for _, r in rejected})) or "nothing"
        raise ConfigError(Problem(f"no such row is in quarantine for {reason}", str(quarantine), f"there: {there}"))
    ledger.release_rows(store, spec.model.name, found, reason, why)
    return prepare_data(spec)


def _check(reason: str, why: str) -> None:
    problems = []
    if not why.strip():
        problems.append(Problem("--why is empty", "data release", act='give it for anyone who asks later: --why "..."'))
    if reason not in set(Reason):
        known = ", ".join(sorted(set(Reason) - UNREADABLE - LEAKS))
        problems.append(Problem(f"no such reason: {reason}", "data release", known))
    elif Reason(reason) in UNREADABLE:
        act = "repair the rows in their source and run `tunegate data` again"
        problems.append(
            Problem(f"{reason} cannot be overruled: there is no usable conversation", "data release", act=act)
        )
    elif Reason(reason) in LEAKS:
        act = "nothing is wrong with the rows; they are too near to what is measured"
        problems.append(Problem(f"{reason} cannot be overruled: a held-out item would leak", "data release", act=act))
    if problems:
        raise ConfigError(*problems)


def _quarantine(spec: RunSpec, store: Store) -> Path:
    """The quarantine of the data as they are now; also of a batch that its contract has stopped."""
    try:
        return store.path(prepare_data(spec)[0].quarantine)
    except DataError:
        stopped = sorted(store.files.glob("validated/*/quarantine.jsonl"), key=lambda path: path.stat().st_mtime)
        if not stopped:
            raise
        return stopped[-1]
