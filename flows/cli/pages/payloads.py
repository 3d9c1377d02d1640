"""Reports as plain dictionaries: what `--json` prints. Their keys are a promise to scripts."""

from pathlib import Path
from typing import Any

from data_contracts.data_reports import DatasetManifest
from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.reports import EvalReport, ModelVersion, RunReport, Stage, TrainReport
from data_contracts.verdict import Comparison, Decision, GateReport
from tasks.reporting.links import model_uri
from tasks.runtime.store import Store


def summary(report: RunReport) -> dict[str, Any]:
    """A whole run: data, arms, verdict, registered model, stages and where the files lie."""
    evals = {item.target: item for item in report.evaluations}
    children = report.recorded.arm_run_ids
    return {
        "run_id": report.run_id,
        "mlflow_run_id": report.recorded.mlflow_run_id,
        "snapshot": dataset_summary(report.dataset),
        "base": {**report.base.model_dump(mode="json"), "eval": _eval(evals.get("base"))},
        "arms": [arm_summary(arm, evals.get(arm.name), children.get(arm.name)) for arm in report.arms],
        "champion": _eval(evals.get("champion")),
        "comparison": report.comparison.model_dump(mode="json"),
        **gate_summary(report.gate),
        "model": model_summary(report.model),
        "loaded_back": report.loaded_back.model_dump(mode="json"),
        "stages": [stage.model_dump(mode="json") for stage in report.stages],
        "report": str(report_file(store_of(report), report.run_id)),
        "html": str(html_file(report)),
    }


def dataset_summary(data: DatasetManifest) -> dict[str, Any]:
    return {"id": data.snapshot_id, **data.model_dump(mode="json", exclude={"snapshot_id"})}


def data_summary(data: DatasetManifest, stages: list[Stage]) -> dict[str, Any]:
    return {"snapshot": dataset_summary(data), "stages": [stage.model_dump(mode="json") for stage in stages]}


def arm_summary(arm: TrainReport, scores: EvalReport | None, mlflow_run_id: str | None) -> dict[str, Any]:
    """One trained arm; the loss curve stays in the report file."""
    own = arm.model_dump(mode="json", exclude={"adapter", "loss"})
    return {
        **own,
        "adapter_sha256": arm.adapter.sha256,
        "adapter": arm.adapter.folder,
        "eval": _eval(scores),
        "mlflow_run_id": mlflow_run_id,
    }


def _eval(report: EvalReport | None) -> dict[str, Any] | None:
    return {**report.model_dump(mode="json"), "perplexity": report.perplexity} if report else None


def gate_summary(gate: GateReport, comparison: Comparison | None = None) -> dict[str, Any]:
    found = gate.model_dump(mode="json")
    return {**found, "comparison": comparison.model_dump(mode="json")} if comparison else found


def decision_summary(decision: Decision) -> dict[str, Any]:
    asked = decision.model_dump(mode="json", include={"model", "name", "version", "rival"})
    return {**asked, **gate_summary(decision.gate, decision.comparison)}


def model_summary(model: ModelVersion) -> dict[str, Any]:
    return {**model.model_dump(mode="json"), "uri": model_uri(model)}


# --- where reports lie --------------------------------------------------------------------------------------


def store_of(report: RunReport) -> Store:
    return Store(Path(report.spec["store"]["root"]))


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
        act = "run again with --force to write it anew"
        raise StoreError(Problem(f"is no readable run report: {error}", str(path), act=act)) from error
