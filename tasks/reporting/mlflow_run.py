"""MLflow's run records: one parent run with a child for each arm, the same metric names in each child.

MLflow takes seconds to import, so it is imported in the functions that use it.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.reports import EvalReport, RecordedRun, TrainReport
from data_contracts.run_spec import RunSpec
from data_contracts.stage_inputs import RunResult
from data_contracts.verdict import Comparison
from tasks.reporting.plots import figures
from tasks.reporting.tables import memory_parts
from tasks.runtime.mlflow_client import KEY_TAG, SPEC_FILE, connect, open_experiment
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGEST_CHARS = 32  # MLflow takes at most 36


def record_run(spec: RunSpec, key: str, result: RunResult) -> RecordedRun:
    """Write the run to MLflow. A run of the same key that is complete is returned; a broken one is removed first."""
    import mlflow

    client = connect(spec.store)
    experiment = open_experiment(client, spec.store, spec.model.name)
    done = _complete_run(client, experiment, key)
    if done:
        return done
    store, dataset = Store.of(spec.store), result.dataset
    scores = {report.target: report for report in result.evaluations}
    with mlflow.start_run(experiment_id=experiment, run_name=f"{spec.model.name} {dataset.snapshot_id[:8]}") as parent:
        tags = {KEY_TAG: key, "tunegate.verdict": result.gate.verdict, "tunegate.snapshot": dataset.snapshot_id}
        mlflow.set_tags(tags)
        mlflow.log_params(_flat(spec.model_dump(mode="json", exclude={"store"})))
        mlflow.log_metrics(_finite(_parent_metrics(dataset, result.comparison, scores)))
        _log_data(dataset, store)
        _log_files(spec, store, result)
        for name, figure in figures(result.arms, result.comparison).items():
            mlflow.log_figure(figure, f"comparison/{name}.png")
        children = {arm.name: _record_arm(client, arm, scores.get(arm.name), dataset, store) for arm in result.arms}
    return RecordedRun(mlflow_run_id=parent.info.run_id, arm_run_ids=children)


def _complete_run(client: "MlflowClient", experiment: str, key: str) -> RecordedRun | None:
    for run in client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'"):
        children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        if run.info.status == "FINISHED":
            arms = {child.data.params["name"]: child.info.run_id for child in children}
            return RecordedRun(mlflow_run_id=run.info.run_id, arm_run_ids=arms)
        for broken in (*children, run):
            client.delete_run(broken.info.run_id)
    return None


def _record_arm(
    client: "MlflowClient", arm: TrainReport, scores: EvalReport | None, dataset: DatasetManifest, store: Store
) -> str:
    import mlflow
    from mlflow.entities import Metric

    with mlflow.start_run(run_name=f"{arm.arm} seed {arm.seed}", nested=True) as child:
        facts = arm.model_dump(mode="json", exclude={"loss", "validation", "adapter"})
        mlflow.log_params({name: value for name, value in facts.items() if isinstance(value, str) or name == "seed"})
        numbers: dict[str, float | None] = {k: float(v) for k, v in facts.items() if isinstance(v, int | float)}
        mlflow.log_metrics(_finite(numbers | _memory(arm) | _scores(scores)))
        mlflow.set_tag("tunegate.adapter_sha256", arm.adapter.sha256)
        if arm.start:
            begun = {"tunegate.started_from": arm.start.version or "scratch", "tunegate.start": arm.start.note}
            mlflow.set_tags(begun)
            mlflow.log_metrics(arm.start.model_dump(include={"new_rows", "old_rows", "replayed_rows"}))
        points = [
            Metric(name, getattr(point, name), 0, point.step)
            for point in arm.loss
            for name in ("loss_nats", "learning_rate")
        ]
        points += [Metric("validation_nll_nats", point.nll_nats, 0, point.step) for point in arm.validation]
        for start in range(0, len(points), 1000):  # MLflow's limit for one batch
            client.log_batch(child.info.run_id, metrics=points[start : start + 1000])
        _log_data(dataset.model_copy(update={"train": arm.start.rows}) if arm.start else dataset, store)
        if scores:
            mlflow.log_artifact(str(store.path(scores.samples)))
            mlflow.log_table(_items(store, scores), "items.json")
    return str(child.info.run_id)


def _items(store: Store, scores: EvalReport) -> Any:
    """A line for each domain item: its facts and every metric. Equal columns, so that MLflow can compare runs."""
    import pandas as pd

    samples = pd.read_json(store.path(scores.samples), lines=True, dtype={"row_id": str})
    facts = pd.read_json(store.path(scores.facts), lines=True, dtype={"row_id": str, "cluster": str})
    domain = samples[samples["task"].str.startswith("domain_")]
    wide = domain.pivot(index="row_id", columns=["task", "metric"], values="value")
    wide.columns = [".".join(name) for name in wide.columns]
    return facts.merge(wide.reset_index(), on="row_id")


def _log_data(dataset: DatasetManifest, store: Store) -> None:
    """The splits as MLflow inputs."""
    import mlflow

    for name, context in (("train", "training"), ("test", "evaluation")):
        ref = getattr(dataset, name)
        mlflow.log_input(_as_dataset(store, ref, name), context=context)
        mlflow.set_tag(f"tunegate.{name}_sha256", ref.sha256)


def _as_dataset(store: Store, ref: FileRef, name: str) -> Any:
    """A split under our own digest: MLflow's collide for chat rows and past 10,000 rows."""
    import pandas as pd
    from mlflow.data.pandas_dataset import from_pandas

    head = pd.read_json(store.path(ref), lines=True, nrows=100, dtype={"row_id": str})
    frame = head[["row_id", "source", "line"]] if len(head) else pd.DataFrame({"row_id": []})
    return from_pandas(frame, source=ref.path, name=name, digest=ref.sha256[:_DIGEST_CHARS])


def _log_files(spec: RunSpec, store: Store, result: RunResult) -> None:
    import mlflow

    dataset = result.dataset
    mlflow.log_dict(result.comparison.model_dump(mode="json"), "comparison.json")
    mlflow.log_dict(result.gate.model_dump(mode="json"), "gate.json")
    mlflow.log_dict(spec.model_dump(mode="json", exclude={"store"}), SPEC_FILE)
    mlflow.log_dict(dataset.model_dump(mode="json"), "dataset.json")
    mlflow.log_artifact(str(store.path(dataset.contract_result)), "contract")
    mlflow.log_artifacts(str(store.path(dataset.data_docs).parent), "contract/data_docs")
    with tempfile.TemporaryDirectory() as folder:
        for report in result.evaluations:
            named = Path(folder) / f"{report.target}.json"
            named.write_text(json.dumps(report.model_dump(mode="json"), indent=1))
        mlflow.log_artifacts(folder, "evaluations")


def _parent_metrics(
    dataset: DatasetManifest, comparison: Comparison, scores: dict[str, EvalReport]
) -> dict[str, float | None]:
    counts = {f"rows_{name}": float(getattr(dataset, name)) for name in ("kept", "quarantined", "duplicates")}
    found: dict[str, float | None] = {"weights_saving": comparison.weights_saving}
    for name in ("retention", "memory_saving", "speed_ratio", "accuracy_drop", "gain", "champion_gain", "stop_rate"):
        estimate = getattr(comparison, name)
        ends = (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    base = {f"base_{name}": value for name, value in _scores(scores.get("base")).items()}
    return {**counts, **found, **base}


def _memory(arm: TrainReport) -> dict[str, float | None]:
    """measured_weights_bytes, planned_logits_bytes and so on."""
    parts = memory_parts(arm).items()
    return {f"{kind}_{part}_bytes": float(count) for kind, found in parts for part, count in found.items()}


def _scores(report: EvalReport | None) -> dict[str, float | None]:
    """An evaluation as metrics; lm-eval's names keep their task in front."""
    if report is None:
        return {}
    own = {
        name: getattr(report, name) for name in ("nll_nats", "bits_per_byte", "perplexity", "accuracy", "ms_per_token")
    }
    return own | {f"{score.task}.{score.metric}": score.value for score in report.scores}


def log_model_scores(store: Store, model_id: str, scores: EvalReport, test: FileRef) -> None:
    """A logged model's scores with the split they were measured on; what MLflow takes over from the run names no data."""
    import mlflow

    mlflow.log_metrics(_finite(_scores(scores)), model_id=model_id, dataset=_as_dataset(store, test, "test"))


def _finite(values: dict[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
