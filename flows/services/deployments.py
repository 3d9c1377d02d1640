"""The deployments of infra/prefect.yaml with a preset's values in place of the demo's, applied to a Prefect server.

`prefect deploy` does the same for a file by hand, but fills in every `{{ name }}` and `{{ $NAME }}` it meets, also in the
parameters: a system prompt with braces in it would not arrive as it was written, or with a secret of the environment in it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, WorkerStatus
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from ruamel.yaml import YAML

from data_contracts.run_spec import RunSpec
from tasks.pipeline.device_lock import find_or_make_limit

DEPLOYMENTS_FILE = Path(__file__).parents[2] / "infra" / "prefect.yaml"
POOL = TAG = "tunegate"
_STRATEGY = {"wait": "ENQUEUE", "skip": "CANCEL_NEW"}

Deployment = dict[str, Any]


def rendered(spec: RunSpec, directory: Path) -> list[Deployment]:
    """The file's deployments for this spec. directory: where its relative paths begin."""
    file = YAML(typ="safe", pure=True).load(DEPLOYMENTS_FILE)
    root = Path(directory, spec.store.root)
    spec = spec.model_copy(update={"store": spec.store.model_copy(update={"root": str(root)})})
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(directory)}}]
    return [{**deployment, **_own(deployment, spec), "pull": pull} for deployment in file["deployments"]]


def _own(deployment: Deployment, spec: RunSpec) -> Deployment:
    """What a deployment has of the preset instead of the file's."""
    whole, name = spec.model_dump(mode="json"), spec.model.name
    values = {"spec": whole, "store": whole["store"], "name": name, "model_uri": f"models:/{name}@challenger"}
    parameters = deployment["parameters"]
    own: Deployment = {"parameters": parameters | {key: values[key] for key in values.keys() & parameters.keys()}}
    settings = spec.schedule
    if deployment["name"] == "retrain":
        cron = {
            "cron": settings.cron,
            "timezone": settings.timezone,
            "parameters": {"reason": f"schedule: {settings.cron}"},
        }
        own["schedules"] = [cron] if settings.cron else []
        own["concurrency_limit"] = {"limit": 1, "collision_strategy": _STRATEGY[settings.when_busy]}
    elif deployment["name"] == "watch":
        own["schedules"] = [{"interval": settings.watch_minutes * 60}] if settings.watch_minutes else []
    return own


def deployments_sha256(deployments: list[Deployment]) -> str:
    return hashlib.sha256(json.dumps(deployments, sort_keys=True).encode()).hexdigest()


def apply(client: SyncPrefectClient, deployments: list[Deployment]) -> None:
    """Make the pool, the limit and every deployment, or bring them up to date."""
    _make_pool(client)
    find_or_make_limit(client)
    for deployment in deployments:
        flow: Flow[..., Any] = load_flow_from_entrypoint(deployment["entrypoint"])
        client.create_deployment(
            flow_id=client.create_flow_from_name(flow.name),
            name=deployment["name"],
            entrypoint=deployment["entrypoint"],
            description=deployment["description"],
            tags=deployment["tags"],
            parameters=deployment["parameters"],
            parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
            enforce_parameter_schema=True,
            schedules=list(_schedules(deployment)),
            concurrency_limit=deployment["concurrency_limit"]["limit"],
            concurrency_options=ConcurrencyOptions(
                collision_strategy=ConcurrencyLimitStrategy(deployment["concurrency_limit"]["collision_strategy"])
            ),
            work_pool_name=deployment["work_pool"]["name"],
            job_variables=deployment["work_pool"]["job_variables"],
            pull_steps=deployment["pull"],
        )


def client_of(url: str) -> SyncPrefectClient:
    """Of this server, no matter which one the environment names."""
    return SyncPrefectClient(api=f"{url}/api")


def are_there(client: SyncPrefectClient, deployments: list[Deployment]) -> bool:
    """Whether nobody has deleted one."""
    there = {found.name for found in client.read_deployments()}
    return {deployment["name"] for deployment in deployments} <= there


def worker_is_online(client: SyncPrefectClient) -> bool:
    return any(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(POOL))


def _make_pool(client: SyncPrefectClient) -> None:
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template))


def set_paused(client: SyncPrefectClient, *, paused: bool) -> None:
    """A worker of a paused pool takes no new run. There may be no pool yet."""
    with suppress(ObjectNotFound):
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=paused))


def _schedules(deployment: Deployment) -> Iterator[DeploymentScheduleCreate]:
    for found in deployment.get("schedules", []):
        if "cron" in found:
            when: Any = CronSchedule(cron=found["cron"], timezone=found["timezone"])
        else:
            when = IntervalSchedule(interval=timedelta(seconds=found["interval"]))
        yield DeploymentScheduleCreate(schedule=when, parameters=found.get("parameters", {}))
