"""`tunegate down`: everything that `up` started for a store is stopped in order, and nothing is left behind."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from data_contracts.errors import InfrastructureError, Problem
from data_contracts.run_spec import StoreSpec
from flows.services import state as services_state
from flows.services.state import services_folder
from flows.services.supervisor import IDLE, Supervisor, end
from tasks.runtime.console import note, page
from tasks.runtime.processes import SECONDS_TO_END

_SECONDS_TO_STOP = 20.0


@dataclass(frozen=True)
class Down:
    """What was stopped."""

    services: list[str]
    runs: list[str]


def down(store: StoreSpec) -> Down:
    """Stop everything that `up` started here, in order: runs write their checkpoint first. Nothing is left behind."""
    folder = services_folder(store)
    if not folder.is_dir():
        return Down([], [])
    with alone(folder):
        return stop(Supervisor(folder), folder)


def stop(supervisor: Supervisor, folder: Path) -> Down:
    services = [name for name, program in supervisor.programs().items() if program.state not in IDLE]
    if services_state.processes(folder):
        _pause(folder)
    runs = _stop_runs(folder)
    if supervisor.is_up():
        note(f"stopping {', '.join(services)}")
        daemon = psutil.Process(supervisor.pid())
        supervisor.shut_down()
        psutil.wait_procs([daemon], timeout=2 * _SECONDS_TO_STOP * len(services))
    left = services_state.processes(folder)  # of a supervisord that was killed, or what would not listen
    end(left, _SECONDS_TO_STOP)
    services_state.forget(folder)
    return Down(services or [process.name() for process in left], runs)


def _pause(folder: Path) -> None:
    """The worker must not take another run while this one ends. A server that is gone gives it none anyway."""
    state = services_state.read_state(folder)
    if state is None:
        return
    server = services_state.prefect_of(folder, state)
    if server.answers():
        from flows.services import deployments as deploy

        with deploy.client_of(server.url) as client:
            deploy.pause(client, True)


def _stop_runs(folder: Path) -> list[str]:
    """SIGTERM for every run's own process: one that trains has its checkpoint written and tells Prefect how it ended."""
    runs = list(services_state.flow_runs(folder))
    names = [name for _, name in runs]
    if runs:
        note(f"{', '.join(names)} at work: asked to end, with a checkpoint; up to {SECONDS_TO_END:.0f} s")
        with page(sys.stderr).status("waiting for a checkpoint"):
            end([process for process, _ in runs], SECONDS_TO_END + _SECONDS_TO_STOP)
    return names


def end_services(folder: Path) -> None:
    """Servers and workers whose supervisord was killed. Runs that still work go on: they wait for their server to come back."""
    left = [process for process in services_state.processes(folder) if not services_state.is_of_a_run(process)]
    end(left, _SECONDS_TO_STOP)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / "up.lock", timeout=0):
            yield
    except Timeout:
        act = "wait for it, or end it"
        raise InfrastructureError(Problem("another tunegate up or down is at work", str(folder), act=act)) from None
