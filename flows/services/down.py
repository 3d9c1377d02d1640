"""`tunegate down`: everything that `up` started for a store is stopped in order, and nothing is left behind."""

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil

from data_contracts.errors import InfrastructureError, Problem
from data_contracts.run_spec import StoreSpec
from flows.services import state as services_state
from flows.services.state import services_folder
from flows.services.supervisor import IDLE, Supervisor, end
from tasks.runtime.console import note, page
from tasks.runtime.processes import SECONDS_TO_END
from tasks.runtime.store import exclusive

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
    with services_lock(folder):
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
    left = services_state.processes(folder)  # of a supervisord that was killed, or what ignored the signal
    end(left, _SECONDS_TO_STOP)
    services_state.forget(folder)
    return Down(services or [process.name() for process in left], runs)


def _pause(folder: Path) -> None:
    """The worker must not take another run while this one ends. A server that is gone gives it none anyway."""
    state = services_state.read_services_state(folder)
    if state is None:
        return
    server = services_state.prefect_of(folder, state)
    if server.answers():
        from flows.services import deployments as deploy

        with deploy.client_of(server.url) as client:
            deploy.set_paused(client, paused=True)


def _stop_runs(folder: Path) -> list[str]:
    """SIGTERM for every run's own process: one that trains has its checkpoint written and reports to Prefect how it ended."""
    runs = list(services_state.flow_runs(folder))
    names = [name for _, name in runs]
    if runs:
        note(f"{', '.join(names)} running: asked to save a checkpoint and stop; waiting up to {SECONDS_TO_END:.0f} s")
        with page(sys.stderr).status("waiting for a checkpoint"):
            end([process for process, _ in runs], SECONDS_TO_END + _SECONDS_TO_STOP)
    return names


def end_services(folder: Path) -> None:
    """Servers and workers whose supervisord was killed. Runs that still work continue: they wait for their server to come back."""
    left = [process for process in services_state.processes(folder) if not services_state.is_of_a_run(process)]
    end(left, _SECONDS_TO_STOP)


def services_lock(folder: Path) -> AbstractContextManager[None]:
    """Only one `up` or `down` of a store works at a time; a second one raises InfrastructureError."""
    act = "wait for it, or end it"
    problem = Problem("another tunegate up or down is running", str(folder), act=act)
    return exclusive(folder / "up.lock", InfrastructureError(problem))
