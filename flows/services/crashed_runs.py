"""Detects flow runs whose process was killed: outside a worker Prefect shows them as running for ever.

Each run's process holds a lock as long as it lives, however it ends: what is unfinished and holds none is gone.
"""

import atexit
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from filelock import FileLock, Timeout
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.services.state import MARK
from tasks.pipeline.run_lock import Holder
from tasks.runtime.console import note

FLOWS = ["retrain", "watch", "gate", "promote", "rollback", "reproduce", "prepare-data"]
"""Every flow of ours; each has the hook `hold`."""
_AT_WORK = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
_PAGE = 200
_SECONDS_TO_START = 600.0
_held: dict[UUID, FileLock] = {}


def mark_crashed(dead: Holder) -> None:
    """Set the run of a killed process to Crashed; nothing to do if this server does not know it or it has ended."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_flow_run(UUID(dead.flow_run_id))
        except ObjectNotFound:
            return
        if found.state is None or not found.state.is_final():
            message = f"its process {dead.process} on {dead.host} was killed; the next run resumes from what it left"
            client.set_flow_run_state(found.id, Crashed(message=message), force=True)
    note(f"an earlier run was killed: {dead.name}; resuming from what it left")


def hold(flow: Any, flow_run: FlowRun, state: Any) -> None:
    """The hook `on_running` of every flow. A server of your own, without our PREFECT_HOME, is not reaped by us."""
    home = os.environ.get("PREFECT_HOME")
    if home is None or flow_run.id in _held:
        return
    # Not `exclusive`: held until the process ends, not for a block.
    lock = FileLock(_lock_file(Path(home), flow_run.id))
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    _held[flow_run.id] = lock
    atexit.register(Path(lock.lock_file).unlink, missing_ok=True)


def _lock_file(home: Path, run: UUID) -> Path:
    return home / "at_work" / str(run)


def _is_held(home: Path, run: UUID) -> bool:
    file = _lock_file(home, run)
    if not file.exists():
        return False
    try:
        # Not `exclusive`: a held lock is the expected answer here, not an error of ours.
        with FileLock(file, timeout=0):
            file.unlink()
    except Timeout:
        return True
    return False


def reap(client: SyncPrefectClient, home: Path, seconds: float = 0.0) -> list[str]:
    """Set every run without a live process to Crashed; return their names.

    seconds: how long a run must have been in its state, where a worker may be just about to start one.
    """
    for file in home.glob("at_work/*"):
        _is_held(home, UUID(file.name))  # takes away what a killed process could not
    at_work = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_AT_WORK)))
    gone = [run for run in _ours(client, at_work) if _age(run) >= seconds and not _is_held(home, run.id)]
    message = "its process was killed; the next run resumes from what it left"
    for run in gone:
        client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    return [run.name for run in gone]


def reap_with_a_worker() -> None:
    """For a flow that `tunegate up` starts every few minutes: on a server of your own, other machines may be at work."""
    if MARK in os.environ:
        with get_client(sync_client=True) as client:
            for name in reap(client, Path(os.environ["PREFECT_HOME"]), _SECONDS_TO_START):
                note(f"an earlier run was killed: {name}")


def _age(run: FlowRun) -> float:
    return (datetime.now(UTC) - run.state.timestamp).total_seconds() if run.state else 0.0


def drop_late(client: SyncPrefectClient) -> int:
    """Delete the runs that a schedule asked for while nothing ran, but for the newest of each deployment; how many."""
    late = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=datetime.now(UTC)),
    )
    seen: set[UUID | None] = set()
    dropped = 0
    for run in [run for run in _ours(client, late) if run.auto_scheduled]:  # newest first
        if run.deployment_id in seen:
            client.delete_flow_run(run.id)
            dropped += 1
        seen.add(run.deployment_id)
    return dropped


def _ours(client: SyncPrefectClient, run_filter: FlowRunFilter) -> list[FlowRun]:
    """Newest first."""
    flows = FlowFilter(name=FlowFilterName(any_=FLOWS))
    order = FlowRunSort.EXPECTED_START_TIME_DESC
    found: list[FlowRun] = []
    while more := client.read_flow_runs(
        flow_filter=flows, flow_run_filter=run_filter, sort=order, limit=_PAGE, offset=len(found)
    ):
        found += more
    return found
