"""`tunegate up`: the servers, the worker and the deployments of one store, kept alive by supervisord.

What runs is changed in two ways only. Deployments follow the preset at each `up`. Servers stay as they were started: to
move a port or after an upgrade it is `down`, then `up`.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from data_contracts.errors import ConfigError, InfrastructureError, Problem
from data_contracts.run_spec import RunSpec, StoreSpec
from flows.config.load import DEFAULT_PRESET, load_spec
from flows.services import state as services_state
from flows.services.doctor import package_problems
from flows.services.down import end_services, services_lock, stop
from flows.services.environment import make_homes, prepare_environment
from flows.services.servers import ENVIRONMENT, MLFLOW_PORT, PREFECT_PORT, START_SECONDS, Server, check_ports, servers
from flows.services.state import MARK, State, services_folder
from flows.services.supervisor import IDLE, Process, Program, Supervisor, configuration
from tasks.reporting.links import MLFLOW_PAGE
from tasks.runtime.console import note, page
from tasks.runtime.store import write_atomically

WORKER = "worker"


@dataclass(frozen=True)
class Up:
    """What is up now, and what this call had to do for it."""

    state: State
    folder: Path
    servers: list[Server]
    started: list[str]
    deployed: list[str]  # deployments that were applied; empty if they were as they should be
    reaped: list[str]  # runs whose process was gone
    dropped: int  # late runs of schedules


def up(preset: str | None, changes: list[str], mlflow_port: int | None, prefect_port: int | None) -> Up:
    """Start what is missing and apply the deployments if they have changed."""
    given = os.environ.pop("PREFECT_API_URL", None)
    spec, state, before = _wanted(preset, changes, mlflow_port, prefect_port)
    folder = services_folder(spec.store)
    found = servers(spec.store, state.mlflow_port or MLFLOW_PORT, state.prefect_port, folder)
    url = f"{_prefect(found).url}/api"
    if given not in (None, url):
        act = "unset PREFECT_API_URL; or deploy to that server by hand, as infra/prefect.yaml says"
        raise ConfigError(Problem(f"PREFECT_API_URL names a Prefect server of your own: {given}", "up", act=act))
    names = [*(server.name.lower() for server in found), WORKER]
    if not folder.is_dir():
        _check(found, names)  # before anything is written
    make_homes(spec.store)
    folder.mkdir(mode=0o700, exist_ok=True)
    with services_lock(folder):
        supervisor = Supervisor(folder)
        runs = supervisor.programs()
        if runs and before:
            _refuse_other_servers(before, state)
        else:  # what a killed supervisord has left, or what runs on unknown ports
            end_services(folder)
            runs = {}
        missing = [name for name in names if _is_idle(runs, name)]
        _check(found, missing)
        prepare_environment(spec.store)
        os.environ["PREFECT_API_URL"] = url
        services_state.write_services_state(folder, replace(state, deployed=before.deployed if before and runs else ""))
        try:
            if not runs:
                write_atomically(supervisor.file, configuration(_programs(found)))
                supervisor.start(_environment(folder, found))
            return _start(spec, supervisor, found, missing)
        except BaseException:
            if not runs:
                stop(supervisor, folder)
            raise


def _wanted(
    preset: str | None, changes: list[str], mlflow_port: int | None, prefect_port: int | None
) -> tuple[RunSpec, State, State | None]:
    """What is requested. Without a preset: what runs in this store keeps running, with the same changes unless there are others."""
    spec = load_spec(preset, changes).spec
    before = services_state.read_services_state(services_folder(spec.store))
    directory = str(Path.cwd())
    if before and preset is None:
        preset, changes, directory = before.preset, changes or before.changes, before.directory
        spec = load_spec(preset, changes).spec
    preset = preset or DEFAULT_PRESET
    if Path(preset).suffix in (".yaml", ".yml"):  # a file, not the name of a preset
        preset = str(Path(preset).resolve())
    default_mlflow = before.mlflow_port if before and before.mlflow_port else MLFLOW_PORT
    state = State(
        preset=preset,
        changes=changes,
        directory=directory,
        prefect_port=prefect_port or (before.prefect_port if before else PREFECT_PORT),
        mlflow_port=None if spec.store.mlflow_uri else mlflow_port or default_mlflow,
        mlflow_uri=spec.store.mlflow_uri,
        versions={name: version(name) for name in ("tunegate", "prefect", "mlflow")},
    )
    return spec, state, before


def _refuse_other_servers(runs: State, wanted: State) -> None:
    pairs: list[tuple[str, object, object]] = [("--prefect-port", runs.prefect_port, wanted.prefect_port)]
    pairs += [("--mlflow-port", runs.mlflow_port, wanted.mlflow_port)]
    pairs += [(name, runs.versions.get(name), found) for name, found in wanted.versions.items()]
    problems = [
        Problem(f"{new} is requested, but {old} runs", name, act="tunegate down, then tunegate up")
        for name, old, new in pairs
        if old != new
    ]
    if problems:
        raise ConfigError(*problems)


def _is_idle(runs: dict[str, Process], name: str) -> bool:
    return name not in runs or runs[name].state in IDLE


def _check(found: list[Server], missing: list[str]) -> None:
    """Versions and ports, before anything starts."""
    if problems := package_problems():
        raise InfrastructureError(*problems)
    check_ports(found, missing)


def _programs(found: list[Server]) -> list[Program]:
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--name", "tunegate", "--pool", "tunegate"]
    # Its log gets a flow's own output; the runs must not get the signals of a stop, see `down`.
    log = 'PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="INFO"'
    restart = [sys.executable, "-m", "flows.services.restart"]
    listed = [Program(server.name.lower(), [*restart, *server.command]) for server in found]
    return [*listed, Program(WORKER, [*worker, "--type", "process"], group=False, environment=log)]


def _environment(folder: Path, found: list[Server]) -> dict[str, str]:
    # Not `uv run`: what a flow needs is installed where `up` runs.
    own = {**ENVIRONMENT, MARK: str(folder), "PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES": "false"}
    for server in found:
        if server.name == "MLflow":
            own[MLFLOW_PAGE] = server.url
    return {**os.environ, **own}


def _start(spec: RunSpec, supervisor: Supervisor, found: list[Server], missing: list[str]) -> Up:
    prefect = _prefect(found)
    for server in found[::-1]:  # Prefect first: it is waited for first
        if server.name.lower() in missing:
            _migrate(server, spec.store)
            supervisor.start_program(server.name.lower())
    _wait(supervisor, prefect)
    deployed, reaped, dropped = _deploy(spec, supervisor.folder, prefect, WORKER in missing)
    for server in found:
        if server is not prefect:
            _wait(supervisor, server)
    if WORKER in missing:
        supervisor.start_program(WORKER)
    _wait_for_worker(supervisor, prefect)
    state = services_state.read_services_state(supervisor.folder)
    assert state is not None  # written above, under the lock
    return Up(state, supervisor.folder, found, missing, deployed, reaped, dropped)


def _migrate(server: Server, store: StoreSpec) -> None:
    """Two processes that migrate a fresh MLflow database at the same time break it; this one does it under a lock."""
    if server.name == "MLflow":
        from tasks.runtime.mlflow_client import connect

        connect(store)


def _deploy(spec: RunSpec, folder: Path, prefect: Server, fresh_worker: bool) -> tuple[list[str], list[str], int]:
    """Deployments, if they have changed; and, while no worker runs, what killed runs and missed schedules have left."""
    from flows.services import crashed_runs
    from flows.services import deployments as deploy

    state = services_state.read_services_state(folder)
    assert state is not None  # written by the caller
    wanted = deploy.rendered(spec, Path(state.directory))
    digest = deploy.deployments_sha256(wanted)
    applied: list[str] = []
    reaped: list[str] = []
    dropped = 0
    with deploy.client_of(prefect.url) as client:
        if digest != state.deployed or not deploy.are_there(client, wanted):
            deploy.apply(client, wanted)
            applied = [deployment["name"] for deployment in wanted]
        deploy.set_paused(client, paused=False)  # as a `down` that was interrupted has left it
        if fresh_worker:
            reaped, dropped = (
                crashed_runs.reap(client, Path(os.environ["PREFECT_HOME"])),
                crashed_runs.drop_late(client),
            )
    services_state.write_services_state(folder, replace(state, deployed=digest))
    return applied, reaped, dropped


def _wait(supervisor: Supervisor, server: Server) -> None:
    """Return when the server answers; raise if it ends, or takes too long."""
    name, began = server.name.lower(), time.monotonic()
    with page(sys.stderr).status(f"{server.name}: starting"):
        while time.monotonic() - began < START_SECONDS:
            if server.answers() and supervisor.programs()[name].state in ("RUNNING", "STARTING"):
                break
            if supervisor.programs()[name].state in ("BACKOFF", *IDLE):
                raise server.no_start()
            time.sleep(0.2)
        else:
            raise server.no_start()
    note(f"{server.name} answers at {server.url}")


def _wait_for_worker(supervisor: Supervisor, prefect: Server) -> None:
    from flows.services import deployments as deploy

    deadline = time.monotonic() + START_SECONDS
    with page(sys.stderr).status("worker: starting"), deploy.client_of(prefect.url) as client:
        while time.monotonic() < deadline:
            if supervisor.programs()[WORKER].state == "RUNNING" and deploy.worker_is_online(client):
                return
            time.sleep(0.3)
    act = f"read {supervisor.folder / 'worker.log'}"
    raise InfrastructureError(Problem("the worker did not start", WORKER, f"{START_SECONDS:.0f} s", act))


def _prefect(found: list[Server]) -> Server:
    return next(server for server in found if server.name == "Prefect")
