"""`tunegate status`: what runs, the last and the next runs, the champions."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID
from zoneinfo import ZoneInfo

from data_contracts.run_spec import StoreSpec
from flows.services import state as services_state
from flows.services.servers import Server, servers
from flows.services.state import State, services_folder
from flows.services.supervisor import Process, Supervisor
from tasks.runtime.console import page
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

    from tasks.release.history import Standing


@dataclass(frozen=True)
class Service:
    """state: running, starting, stopped, or unresponsive (the process exists but does not answer)."""

    name: str
    state: str
    pid: int | None
    url: str | None
    since: str | None  # ISO 8601, this machine's time


@dataclass(frozen=True)
class LastRun:
    name: str
    state: str
    kind: str  # Prefect's type of the state
    started: str | None
    seconds: float | None


@dataclass(frozen=True)
class NextRun:
    """when: in the time zone of its schedule. state: Scheduled, Late, AwaitingConcurrencySlot (behind another run)."""

    when: str
    state: str


@dataclass(frozen=True)
class Deployed:
    """A deployment, its newest runs and those to come."""

    name: str
    schedule: str
    last: list[LastRun]
    next: list[NextRun]


@dataclass(frozen=True)
class Status:
    """services and deployments are empty if nothing was started. unfinished: moves of a champion that a killed process left."""

    state: State | None
    services: list[Service]
    deployments: list[Deployed]
    models: list["Standing"]
    unfinished: list[str]

    @property
    def healthy(self) -> bool:
        return all(service.state == "running" for service in self.services)


def read_status(store: StoreSpec) -> Status:
    """Ask supervisord, Prefect and the registry. Nothing is started and nothing is changed."""
    folder = services_folder(store)
    state = services_state.read_services_state(folder)
    if state and state.mlflow_uri:
        store = store.model_copy(update={"mlflow_uri": state.mlflow_uri})
    services = _services(store, folder, state) if state else []
    deployments: list[Deployed] = []
    with page(sys.stderr).status("asking Prefect and the registry"):
        if state and any(service.name == "prefect" and service.state == "running" for service in services):
            from flows.services.deployments import client_of

            with client_of(services_state.prefect_of(folder, state).url) as client:
                deployments = list(_deployments(client))
        return Status(state, services, deployments, *_champions(store))


def _services(store: StoreSpec, folder: Path, state: State) -> list[Service]:
    from flows.services.up import WORKER

    found = servers(store, state.mlflow_port or 0, state.prefect_port, folder)
    named: dict[str, Server | None] = {**{server.name.lower(): server for server in found}, WORKER: None}
    runs = Supervisor(folder).programs()
    return [_service(name, server, runs.get(name)) for name, server in named.items()]


def _service(name: str, server: Server | None, process: Process | None) -> Service:
    url = server.url if server else None
    if process is None or process.state not in ("RUNNING", "STARTING"):
        return Service(name, "stopped", pid=None, url=url, since=None)
    state = "running" if process.state == "RUNNING" or server else "starting"
    if server and not server.answers():
        state = "starting" if process.state == "STARTING" else "silent"
    since = datetime.fromtimestamp(process.started_unix_seconds).astimezone().isoformat(timespec="seconds")
    return Service(name, state, process.pid, url, since)


def _champions(store: StoreSpec) -> tuple[list["Standing"], list[str]]:
    if not store.mlflow_uri and not (Store.of(store).root / "mlflow.db").exists():
        return [], []
    from tasks.release.history import champions

    return champions(store)


def _deployments(client: "SyncPrefectClient") -> Iterator[Deployed]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    from flows.services.deployments import TAG

    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    for found in sorted(client.read_deployments(deployment_filter=ours), key=lambda one: _ORDER.get(one.name, 9)):
        text, zone = _schedule(found)
        yield Deployed(found.name, text, list(_last(client, found.id)), list(_next(client, found.id, zone)))


_ORDER = {"retrain": 0, "watch": 1, "gate": 2, "promote": 3}


def _schedule(deployment: "DeploymentResponse") -> tuple[str, str]:
    """In words, and its time zone."""
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

    if deployment.paused:
        return "paused", "UTC"
    if not deployment.schedules:
        return "by hand", "UTC"
    item = deployment.schedules[0]
    if not item.active:
        return "paused", "UTC"
    if isinstance(item.schedule, CronSchedule):
        zone = item.schedule.timezone or "UTC"
        return f"{item.schedule.cron} ({zone})", zone
    assert isinstance(item.schedule, IntervalSchedule)  # `deployments` makes no other
    return f"every {item.schedule.interval.total_seconds() / 60:g} min", "local"


def _runs(client: "SyncPrefectClient", deployment: UUID, kinds: list[str], order: str, limit: int) -> "list[FlowRun]":
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    types = filters.FlowRunFilterStateType(any_=[StateType[kind] for kind in kinds])
    run_filter = filters.FlowRunFilter(
        deployment_id=filters.FlowRunFilterDeploymentId(any_=[deployment]),
        state=filters.FlowRunFilterState(type=types),
    )
    return client.read_flow_runs(flow_run_filter=run_filter, sort=FlowRunSort[order], limit=limit)


def _last(client: "SyncPrefectClient", deployment: UUID) -> Iterator[LastRun]:
    kinds = ["RUNNING", "PENDING", "COMPLETED", "FAILED", "CRASHED", "CANCELLED", "CANCELLING"]
    for run in _runs(client, deployment, kinds, "EXPECTED_START_TIME_DESC", 3):
        began = run.start_time
        seconds = round(run.estimated_run_time.total_seconds(), 1) if began else None
        kind = run.state.type.value if run.state else ""
        yield LastRun(run.name, run.state_name or "", kind, _local(began) if began else None, seconds)


def _next(client: "SyncPrefectClient", deployment: UUID, zone: str) -> Iterator[NextRun]:
    for run in _runs(client, deployment, ["SCHEDULED"], "NEXT_SCHEDULED_START_TIME_ASC", 2):
        when = run.next_scheduled_start_time or run.expected_start_time
        if when is None:  # Prefect gives every scheduled run one
            continue
        there = _local(when) if zone == "local" else when.astimezone(ZoneInfo(zone)).isoformat(timespec="seconds")
        yield NextRun(there, run.state_name or "")


def _local(when: datetime) -> str:
    return datetime.fromtimestamp(when.timestamp(), UTC).astimezone().isoformat(timespec="seconds")
