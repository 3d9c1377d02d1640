"""`tunegate up`, `down`, `status`: the pipeline that runs unattended; `ui`, its pages in the foreground; `doctor`."""

from functools import partial
from typing import Annotated

import typer

from flows.cli.options import AsJson, Changes, Preset, StoreChanges
from flows.cli.output import USAGE, Outcome

services_app = typer.Typer()

INFRASTRUCTURE = 4


@services_app.command("up")
def up_command(
    preset: Preset = None,
    mlflow_port: Annotated[
        int | None, typer.Option("--mlflow-port", min=1, max=65535, help="5000, or as it runs, if left out.")
    ] = None,
    prefect_port: Annotated[
        int | None, typer.Option("--prefect-port", min=1, max=65535, help="4200, or as it runs, if left out.")
    ] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Start servers, worker and schedules on this machine, and keep them alive. A second call starts what is missing and applies what changed."""
    from flows.cli.pages.services import show_up, up_summary
    from flows.services.up import up

    found = up(preset, changes or [], mlflow_port, prefect_port)
    return Outcome(up_summary(found), partial(show_up, found))


@services_app.command("down")
def down_command(changes: StoreChanges = None, as_json: AsJson = False) -> Outcome:
    """Stop what `up` started; a training writes its checkpoint first."""
    from flows.cli.pages.services import down_summary, show_down
    from flows.config.load import load_store
    from flows.services.down import down
    from flows.services.environment import prepare_environment

    store = load_store(changes or [])
    prepare_environment(store)
    found = down(store)
    return Outcome(down_summary(found), partial(show_down, found))


@services_app.command("status")
def status_command(changes: StoreChanges = None, as_json: AsJson = False) -> Outcome:
    """What runs, the last and next runs, the champions. Exit code 4 if something is down that should be up."""
    from flows.cli.pages.services import show_status, status_summary
    from flows.config.load import load_store
    from flows.services.environment import prepare_environment
    from flows.services.status import read_status

    store = load_store(changes or [])
    prepare_environment(store)
    found = read_status(store)
    return Outcome(status_summary(found), partial(show_status, found), 0 if found.healthy else INFRASTRUCTURE)


@services_app.command("ui")
def ui_command(
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", min=1, max=65535)] = 5000,
    prefect_port: Annotated[int, typer.Option("--prefect-port", min=1, max=65535)] = 4200,
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Open MLflow's and Prefect's pages on this machine; Ctrl-C stops both. `up` keeps them open."""
    from flows.cli.pages.services import show_open, urls
    from flows.config.load import load_store
    from flows.services.environment import prepare_environment
    from flows.services.servers import servers, show_servers, start_all, wait_for_ctrl_c
    from flows.services.state import open_here

    store = load_store(changes or [])
    if state := open_here(store):
        return Outcome(urls(state), partial(show_open, state))
    prepare_environment(store)
    running = servers(store, mlflow_port, prefect_port)
    start_all(running)
    payload = {server.name.lower(): server.url for server in running}
    return Outcome(payload, partial(show_servers, running), then=partial(wait_for_ctrl_c, running))


@services_app.command("doctor")
def doctor_command(changes: StoreChanges = None, as_json: AsJson = False) -> Outcome:
    """What is installed, which device and precision and why, what is missing, how to fix it."""
    from flows.config.load import load_store
    from flows.services.doctor import examine, healthy, payload, show_checks

    checks = examine(load_store(changes or []))
    return Outcome(payload(checks), partial(show_checks, checks), 0 if healthy(checks) else USAGE)
