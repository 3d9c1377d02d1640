"""`tunegate up` and `tunegate down`: the servers, the worker and the deployments of one store, kept alive by supervisord.

What runs is changed in two ways only. Deployments follow the preset at each `up`. Servers stay as they were started: to
move a port or after an upgrade it is `down`, then `up`.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from data_contracts.errors import ConfigError, InfrastructureError, Problem
from data_contracts.run_spec import RunSpec, StoreSpec
from flows import services_state
from flows.console import page, tell
from flows.doctor import package_problems
from flows.environment import make_homes, prepare_environment
from flows.servers import ENVIRONMENT, MLFLOW_PORT, PREFECT_PORT, START_SECONDS, Server, check_ports, servers
from flows.services_state import MARK, State, services_folder
from flows.spec_files import DEFAULT_PRESET, load_spec
from flows.supervised import Program, Supervisor, configuration, end
from tasks.processes import SECONDS_TO_END

WORKER = "worker"
_SECONDS_TO_STOP = 20.0
_IDLE = ("STOPPED", "EXITED", "FATAL")


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


@dataclass(frozen=True)
class Down:
    """What was stopped."""

    services: list[str]
    runs: list[str]


def up(preset: str | None, changes: list[str], mlflow_port: int | None, prefect_port: int | None) -> Up:
    """Start what is missing and apply the deployments if they have changed."""
    given = os.environ.get("PREFECT_API_URL")
    spec, state, before = _wanted(preset, changes, mlflow_port, prefect_port)
    folder = services_folder(spec.store)
    found = servers(spec.store, state.mlflow_port or MLFLOW_PORT, state.prefect_port, folder)
    url = f"{_prefect(found).url}/api"
    if given not in (None, url):
        act = "unset PREFECT_API_URL; or deploy to that server by hand, as infra/prefect.yaml says"
        raise ConfigError(Problem(f"PREFECT_API_URL names a Prefect server of your own: {given}", "up", act=act))
    make_homes(spec.store)
    folder.mkdir(mode=0o700, exist_ok=True)
    with _alone(folder):
        supervisor = Supervisor(folder)
        runs = supervisor.programs()
        if runs and before:
            _refuse_other_servers(before, state)
        elif not runs:
            _end_services(folder)
        missing = [name for name in [*(s.name.lower() for s in found), WORKER] if _is_idle(runs, name)]
        _check(found, missing)
        os.environ |= {"PREFECT_API_URL": url}
        prepare_environment(spec.store)
        services_state.write_state(folder, replace(state, deployed=before.deployed if before and runs else ""))
        try:
            if not runs:
                supervisor.file.write_text(configuration(_programs(found)), encoding="utf-8")
                supervisor.start(_environment(folder))
            return _start(spec, supervisor, found, missing)
        except BaseException:
            if not runs:
                _stop(supervisor, folder)
            raise


def _wanted(
    preset: str | None, changes: list[str], mlflow_port: int | None, prefect_port: int | None
) -> tuple[RunSpec, State, State | None]:
    """What is asked for. Without a preset: what runs in this store goes on, with the same changes unless there are others."""
    spec = load_spec(preset, changes).spec
    before = services_state.read_state(services_folder(spec.store))
    directory = str(Path.cwd())
    if before and preset is None:
        preset, changes, directory = before.preset, changes or before.changes, before.directory
        spec = load_spec(preset, changes).spec
    preset = preset or DEFAULT_PRESET
    if Path(preset).suffix:  # a file, not the name of a preset
        preset = str(Path(preset).resolve())
    default_mlflow = before.mlflow_port if before and before.mlflow_port else MLFLOW_PORT
    state = State(
        preset=preset,
        changes=changes,
        directory=directory,
        prefect_port=prefect_port or (before.prefect_port if before else PREFECT_PORT),
        mlflow_port=None if spec.store.mlflow_uri else mlflow_port or default_mlflow,
        versions={name: version(name) for name in ("tunegate", "prefect", "mlflow")},
    )
    return spec, state, before


def _refuse_other_servers(runs: State, asked: State) -> None:
    named = {"prefect_port": "--prefect-port", "mlflow_port": "--mlflow-port", "versions": "versions"}
    problems = [
        Problem(f"is {getattr(runs, key)} in what runs, and {getattr(asked, key)} is asked for", name, act=_AFRESH)
        for key, name in named.items()
        if getattr(runs, key) != getattr(asked, key)
    ]
    if problems:
        raise ConfigError(*problems)


_AFRESH = "tunegate down, then tunegate up"


def _is_idle(runs: dict[str, services_state.Any], name: str) -> bool:
    return name not in runs or runs[name].state in _IDLE


def _check(found: list[Server], missing: list[str]) -> None:
    """Versions and ports, before anything starts."""
    if problems := package_problems():
        raise InfrastructureError(*problems)
    check_ports(found, missing)


def _programs(found: list[Server]) -> list[Program]:
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--name", "tunegate", "--pool", "tunegate"]
    # Its log is where a flow's own output goes; the signals of a stop are not for the runs, see `down`.
    log = 'PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="INFO"'
    listed = [Program(server.name.lower(), server.command) for server in found]
    return [*listed, Program(WORKER, [*worker, "--type", "process"], group=False, environment=log)]


def _environment(folder: Path) -> dict[str, str]:
    # Not `uv run`: what a flow needs is installed where `up` runs.
    return {**os.environ, **ENVIRONMENT, MARK: str(folder), "PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES": "false"}
