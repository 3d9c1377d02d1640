"""What `tunegate up` started for a store: noted in STORE/store/services, and found again among the machine's processes."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from data_contracts.errors import Problem, StoreError
from data_contracts.run_spec import StoreSpec
from flows.services.servers import HEALTH, Server
from flows.services.supervisor import Supervisor
from tasks.runtime.store import Store, write_atomically

MARK = "TUNEGATE_SERVICES"
"""In the environment of all that `up` starts and of what these start: the folder. Nothing of it can get lost."""
_FLOW_RUN = "PREFECT__FLOW_RUN_ID"


@dataclass(frozen=True)
class State:
    """What was requested. deployed: digest of the deployments that were applied last."""

    preset: str
    changes: list[str]
    directory: str
    prefect_port: int
    mlflow_port: int | None  # None: a tracking server of your own, which is
    mlflow_uri: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    deployed: str = ""


def services_folder(store: StoreSpec) -> Path:
    return Store.of(store).files.resolve() / "services"


def read_services_state(folder: Path) -> State | None:
    """None if nothing was started, or it was stopped."""
    try:
        return State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        act = "delete it, then tunegate up: what runs is found without it"
        raise StoreError(Problem(f"cannot be read: {error}", str(folder / "state.json"), act=act)) from error


def write_services_state(folder: Path, state: State) -> None:
    write_atomically(folder / "state.json", json.dumps(asdict(state), indent=1))


def forget(folder: Path) -> None:
    (folder / "state.json").unlink(missing_ok=True)


def prefect_of(folder: Path, state: State) -> Server:
    """The Prefect server of these services, to ask whether it answers."""
    return Server("Prefect", state.prefect_port, [], HEALTH["Prefect"], folder / "prefect.log")


def open_here(store: StoreSpec) -> State | None:
    """What is up here and answers within a second: the port alone may be another store's by now."""
    folder = services_folder(store)
    state = read_services_state(folder)
    if state is None or not Supervisor(folder).is_up():
        return None
    return state if prefect_of(folder, state).answers(1.0) else None


def processes(folder: Path) -> list[psutil.Process]:
    """Everything that `up` started here and what that started, no matter which process is its parent now."""
    mine = os.getpid()
    return [
        process for process in psutil.process_iter() if process.pid != mine and value_of(process, MARK) == str(folder)
    ]


def is_of_a_run(process: psutil.Process) -> bool:
    return value_of(process, _FLOW_RUN) is not None


def flow_runs(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The topmost process of each flow run that a worker started, and the flow's name."""
    for process in processes(folder):
        run = value_of(process, _FLOW_RUN)
        with suppress(psutil.Error):
            parent = process.parent()
            if run and (parent is None or value_of(parent, _FLOW_RUN) != run):
                yield process, value_of(process, "PREFECT__FLOW_NAME") or "a flow"


def value_of(process: psutil.Process, name: str) -> str | None:
    """A variable of a process as it was started; None also for a process that has ended."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(name)
    except psutil.Error:
        return None
