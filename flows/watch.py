"""Is a retrain due? Start one with a reason, or end as Skipped with the reason why not, in seconds."""

import hashlib
import os

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound

from data_contracts.data_reports import SourceCheck, Watched
from data_contracts.run_spec import RunSpec
from flows.prepare_data import ingested
from flows.retrain import retrain
from flows.runner import Stages, in_store, skipped
from flows.services.crashed_runs import hold, reap_with_a_worker
from tasks.data import freshness
from tasks.release.champion import champion_days
from tasks.runtime.console import note
from tasks.runtime.store import Store

FRESH_EVENT = "tunegate.data.fresh"
DEPLOYMENT = "retrain/retrain"
_STARTS = 3  # of a retrain that was killed; one that failed would fail again


def watch(spec: RunSpec) -> Watched:
    """Look, and if a retrain is due start its deployment, or run it here if this server has none."""
    found = in_store(watch_flow, spec)(spec)
    if found.due and found.run is None:
        report = retrain(spec, reason=found.why)
        return found.model_copy(update={"run": report.run_id if report else None})
    return found


@flow(name="watch", result_serializer="json", on_running=[hold])
def watch_flow(spec: RunSpec) -> Watched:
    """The Watched; in a state named Skipped if nothing was started."""
    reap_with_a_worker()
    if changing := freshness.still_changing(spec.data, spec.schedule.quiet_seconds):
        return _skipped(Watched(due=False, why=changing, look=None))
    store = Store.of(spec.store)
    snapshot = ingested(Stages.of(spec), store, spec)
    age = champion_days(spec.store, spec.model.name)
    look, due, why = freshness.decide_retrain(store, spec, snapshot, age)
    if not due:
        return _skipped(Watched(due=False, why=why, look=look))
    note(f"due: {why}")
    _emit_event(spec.model.name, look, why)
    return _start(spec, Watched(due=True, why=why, look=look))


def _emit_event(name: str, look: SourceCheck, why: str) -> None:
    payload = {"new_rows": look.new_rows, "known_rows": look.known_rows, "snapshot": look.snapshot_id, "reason": why}
    emit_event(FRESH_EVENT, resource={"prefect.resource.id": f"tunegate.data.{name}"}, payload=payload)


def _skipped(found: Watched) -> Watched:
    note(f"no retrain: {found.why}")
    return skipped(found, found.why)


def _start(spec: RunSpec, found: Watched) -> Watched:
    """Start the deployment once for these rows and this spec, however often this is called."""
    if "PREFECT_API_URL" not in os.environ:
        return found
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return found
        keys = _keys(spec, found)
        last = _last_start(client, keys)
        number = 0 if last is None else keys.index(str(last.idempotency_key))
        if last is not None:
            if refusal := _refusal(last, number):
                return _skipped(found.model_copy(update={"due": False, "why": f"{found.why}; {refusal}"}))
            number += 1
        parameters = {"spec": spec.model_dump(mode="json"), "reason": found.why}
        run = client.create_flow_run_from_deployment(
            deployment.id, parameters=parameters, idempotency_key=keys[number], tags=["fresh-data"]
        )
    note(f"started {DEPLOYMENT}: {run.name}")
    return found.model_copy(update={"run": run.name})


def _keys(spec: RunSpec, found: Watched) -> list[str]:
    """One for each start of a retrain of this spec on this snapshot."""
    assert found.look is not None  # due: it has looked
    text = f"{found.look.snapshot_id} {spec.model_dump_json()}"
    name = f"{spec.model.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return [f"{name}-{number}" for number in range(1, _STARTS + 1)]


def _last_start(client: SyncPrefectClient, keys: list[str]) -> FlowRun | None:
    asked = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys))
    return max(client.read_flow_runs(flow_run_filter=asked), key=lambda run: str(run.idempotency_key), default=None)


def _refusal(last: FlowRun, number: int) -> str | None:
    """Why a retrain that was started already is not started again; None if it was killed and may be."""
    state = last.state
    if state is None or not state.is_final():
        return f"{last.name} is already training on them"
    if not state.is_crashed():
        message = (state.message or "").splitlines()
        why = f": {message[0]}" if message else ""
        return f"{last.name} ended as {state.name} on them{why}; next: mend it, then tunegate run"
    if number + 1 >= _STARTS:
        return f"{last.name} was the last of {_STARTS} that were killed; next: find out by what, then tunegate run"
    return None
