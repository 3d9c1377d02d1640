"""Reports as plain dictionaries: what `--json` prints. Their keys are a promise to scripts."""

from typing import Any

from data_contracts.data_reports import DatasetManifest
from data_contracts.reports import EvalReport, ModelVersion, RunReport, Stage, TrainReport
from data_contracts.verdict import Comparison, Decision, GateReport
from tasks.reporting.finished_runs import html_file, report_file, store_of
from tasks.reporting.links import model_uri


def summary(report: RunReport) -> dict[str, Any]:
    """A whole run: data, arms, verdict, registered model, stages and where the files are."""
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
    asked = decision.model_dump(mode="json", include={"model", "name", "version", "champion"})
    return {**asked, **gate_summary(decision.gate, decision.comparison)}


def model_summary(model: ModelVersion) -> dict[str, Any]:
    return {**model.model_dump(mode="json"), "uri": model_uri(model)}
