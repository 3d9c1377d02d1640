"""Finished runs: found by run id or MLflow run id, with the places of their files."""

from pathlib import Path

from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.reports import RunReport
from data_contracts.run_spec import StoreSpec
from tasks.runtime.store import Store

# --- places of reports --------------------------------------------------------------------------------------


def store_of(report: RunReport) -> Store:
    return Store.of(StoreSpec.model_validate(report.spec["store"]))


def report_file(store: Store, run_id: str) -> Path:
    return store.files / "runs" / run_id / "report.json"


def html_file(report: RunReport) -> Path:
    return store_of(report).files / report.html


def find_report(store: Store, run_id: str | None) -> RunReport:
    """The newest run's report, or the one whose run id or MLflow run id begins with `run_id`."""
    files = sorted(store.files.glob("runs/*/report.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not files:
        act = "start one with `tunegate run`, or name the store with --set store.root=DIR"
        raise ConfigError(Problem("holds no finished run", str(store.root), act=act))
    if run_id is None:
        return _here(_read(files[0]), store)
    by_name = [path for path in files if path.parent.name.startswith(run_id)]
    found = [_read(path) for path in by_name] or [
        report for report in map(_read, files) if report.recorded.mlflow_run_id.startswith(run_id)
    ]
    if len(found) != 1:
        known = ", ".join(path.parent.name for path in files[:5])
        what = f"{len(found)} runs begin with {run_id!r}" if found else f"no run is called {run_id!r}"
        raise ConfigError(Problem(what, str(store.root), act=f"the newest runs are {known}"))
    return _here(found[0], store)


def _here(report: RunReport, store: Store) -> RunReport:
    """The report, pointing into the store it was found in: a store can be moved."""
    moved = {**report.spec["store"], "root": str(store.root)}
    return report.model_copy(update={"spec": {**report.spec, "store": moved}})


def _read(path: Path) -> RunReport:
    try:
        return RunReport.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        act = "run again with --force to write it again"
        raise StoreError(Problem(f"is no readable run report: {error}", str(path), act=act)) from error
