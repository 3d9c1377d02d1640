"""What `up`, `down` and `status` print, and their JSON."""

from datetime import datetime
from typing import TYPE_CHECKING, Any

from data_contracts.run_spec import StoreSpec
from flows.services.servers import HOST
from flows.services.status import Deployed, LastRun, NextRun, Service, Status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flows.services.down import Down
    from flows.services.state import State
    from flows.services.up import Up
    from tasks.release.history import Standing

_COLOURS = {"running": "green", "starting": "yellow", "stopped": "red", "silent": "red"}
_RUN_COLOURS = {"COMPLETED": "green", "FAILED": "red", "CRASHED": "red", "RUNNING": "cyan", "PENDING": "cyan"}


def urls(state: "State") -> dict[str, str]:
    ports = {"mlflow": state.mlflow_port, "prefect": state.prefect_port}
    return {name: f"http://{HOST}:{port}" for name, port in ports.items() if port}


def show_open(state: "State", console: "Console") -> None:
    for name, url in urls(state).items():
        console.print(f"{name:<8} {url}", soft_wrap=True)
    console.print("tunegate up keeps them open; tunegate down stops them")


# --- up and down --------------------------------------------------------------------------------------------


def up_summary(found: "Up") -> dict[str, Any]:
    return {
        "services": {server.name.lower(): server.url for server in found.servers},
        "started": found.started,
        "deployed": found.deployed,
        "preset": found.state.preset,
        "reaped": found.reaped,
        "late_runs_dropped": found.dropped,
        "folder": str(found.folder),
    }


def show_up(found: "Up", console: "Console") -> None:
    lines = [
        f"{server.name:<12} {server.url}  {_whether(server.name.lower(), found.started)}" for server in found.servers
    ]
    lines.append(f"{'worker':<12} {_whether('worker', found.started)}")
    what = f"now as {found.state.preset} says" if found.deployed else f"as {found.state.preset} says, nothing to change"
    lines.append(f"deployments  retrain, watch, gate, promote: {what}")
    if found.reaped:
        lines.append(f"set right    {', '.join(found.reaped)}: their process had been killed")
    if found.dropped:
        lines.append(f"dropped      {found.dropped} missed runs of schedules; the newest of each still runs")
    (prefect,) = (server for server in found.servers if server.name == "Prefect")
    lines.append(f"next: a retrain from the browser: {prefect.url}/deployments, retrain, Run, Custom run")
    lines.append(f"      tunegate status{_store(found)}, tunegate down{_store(found)}; logs in {found.folder}")
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _whether(name: str, started: list[str]) -> str:
    return "started" if name in started else "was up"


def _store(found: "Up") -> str:
    root = str(found.folder.parent.parent)
    default = found.folder.parent.parent.parent.joinpath(StoreSpec().root)
    return "" if str(default) == root else f" --set store.root={root}"


def down_summary(found: "Down") -> dict[str, Any]:
    return {"stopped": found.services, "runs": found.runs}


def show_down(found: "Down", console: "Console") -> None:
    if not found.services:
        console.print("nothing was up")
        return
    console.print(f"stopped {', '.join(found.services)}", markup=False)
    if found.runs:
        console.print(f"ended {', '.join(found.runs)}: the next run resumes from its checkpoint", markup=False)


# --- status -------------------------------------------------------------------------------------------------


def status_summary(found: Status) -> dict[str, Any]:
    return {
        "up": found.state is not None,
        "healthy": found.healthy,
        "preset": found.state.preset if found.state else None,
        "services": [vars(service) for service in found.services],
        "deployments": [
            {**vars(one), "last": [vars(run) for run in one.last], "next": [vars(run) for run in one.next]}
            for one in found.deployments
        ],
        "models": [model._asdict() for model in found.models],
        "unfinished": found.unfinished,
    }


def show_status(found: Status, console: "Console") -> None:
    if found.state is None:
        console.print("nothing is up; next: tunegate up")
    else:
        console.print(_services(found.services))
        if not found.healthy:
            console.print("next: tunegate up starts what is missing", style="bold")
        if found.deployments:
            console.print(f"\nas {found.state.preset} says", markup=False, soft_wrap=True)
            console.print(_deployments(found.deployments))
    if found.models:
        console.print()
        console.print(_models(found.models))
    for line in found.unfinished:
        console.print(_coloured(line, "yellow"), soft_wrap=True)


def _services(services: list[Service]) -> "Table":
    table = _table("service", "state", "pid", "since", "page")
    for one in services:
        state = _coloured(one.state, _COLOURS[one.state])
        _row(table, one.name, state, str(one.pid or "-"), _short(one.since), one.url or "-")
    return table


def _deployments(deployments: list[Deployed]) -> "Table":
    from rich.text import Text

    table = _table("deployment", "schedule", "last runs", "next")
    for one in deployments:
        last = Text("\n").join(_run(run) for run in one.last) if one.last else Text("none yet")
        _row(table, one.name, one.schedule, last, "\n".join(map(_coming, one.next)) or "-")
    return table


def _run(run: LastRun) -> "Text":
    text = _coloured(run.state, _RUN_COLOURS.get(run.kind, "yellow"))
    text.append(f" {_short(run.started)}" if run.started else "", style="default")
    return text.append(f", {_took(run.seconds)}" if run.seconds is not None else "", style="default")


def _coming(run: NextRun) -> str:
    return "waits for its turn" if run.state == "AwaitingConcurrencySlot" else _short(run.when)


def _took(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _models(models: list["Standing"]) -> "Table":
    table = _table("model", "alias", "version", "gates", "since")
    for one in models:
        since = datetime.fromtimestamp(one.since_unix_seconds).astimezone().isoformat(timespec="seconds")
        gates = _coloured(f"{one.verdict}, overridden: {one.override}", "bold red") if one.override else one.verdict
        _row(table, one.name, one.alias, one.version, gates, _short(since))
    return table


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _row(table: "Table", *cells: "str | Text") -> None:
    """Names are never markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _coloured(text: str, colour: str) -> "Text":
    from rich.text import Text

    return Text(text, style=colour)


def _short(iso: str | None) -> str:
    """2026-11-24 22:36 +01:00"""
    return "-" if iso is None else f"{iso[:10]} {iso[11:16]} {iso[19:]}"
