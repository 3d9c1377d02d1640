"""What a run shows on its page in Prefect: data, live training, comparison, gates, report.

They are made by the flow after a stage, not in it, so a run that found a stage done before shows them too. All text is
escaped, no row of the data is shown, and an artifact that cannot be made never fails the run.
"""

import re
import time
from collections.abc import Sequence
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run

from data_contracts.data_reports import DatasetManifest
from data_contracts.reports import EvalReport, LossPoint, RunReport, TrainReport
from data_contracts.run_spec import StoreSpec
from data_contracts.verdict import Comparison, GateReport, GateResult
from tasks.reporting.links import data_files, mlflow_page, model_uri, prefect_page
from tasks.reporting.markdown import backslashed, environment, needs, plain_interval, plain_number
from tasks.reporting.sentences import label_of, sentences
from tasks.reporting.tables import PARTS, choices, cost_rows, memory_parts, models_by_name, score_rows, size
from tasks.runtime.console import best_effort
from tasks.runtime.processes import WorkerEvent
from tasks.runtime.store import Store

_SECONDS_BETWEEN_UPDATES = 5.0
_CURVE_ROWS = 10
_FAILED = "not shown in Prefect"


@best_effort(_FAILED)
def publish_data(store: Store, data: DatasetManifest) -> None:
    """Every row by its fate, drift, and the places of the files."""
    files = {name: path.relative_to(store.files) for name, path in data_files(data, store).items()}
    _markdown("data", "data.md.j2", data=data, files=files, store=store.files.resolve())


@best_effort(_FAILED)
def publish_training(arm: TrainReport) -> None:
    """A trained arm: its loss over the steps, and what it took."""
    shown = {"curve": _curve(arm), "memory": memory_parts(arm), "choices": choices(arm), "labels": PARTS}
    _markdown(training_key(arm.name), "training.md.j2", arm=arm, label=label_of(arm.arm), size=size, **shown)


@best_effort(_FAILED)
def publish_verdict(
    arms: Sequence[TrainReport], evaluations: Sequence[EvalReport], comparison: Comparison, gates: GateReport
) -> None:
    """The models side by side, and every gate with what it needs, what was measured, and why."""
    models = models_by_name(arms, evaluations)
    rows = score_rows(models, comparison), cost_rows(models)
    lines, names = list(sentences(comparison)), [label_of(name) for name in models]
    _markdown("comparison", "comparison.md.j2", found=comparison, names=names, tables=rows, sentences=lines)
    off = f"; not judged: {backslashed('; '.join(gates.off))}" if gates.off else ""
    create_table_artifact([_gate_row(gate) for gate in gates.gates], "gates", f"**{gates.verdict.upper()}**{off}")


@best_effort(_FAILED)
def publish_report(report: RunReport) -> None:
    """Where to look next: the report, the MLflow run, the version."""
    spec = StoreSpec.model_validate(report.spec["store"])
    html = (Store.of(spec).files / report.html).resolve()
    pages = {"mlflow": mlflow_page(spec, report.recorded.mlflow_run_id), "prefect": prefect_page(flow_run.id)}
    _markdown("report", "report.md.j2", report=report, uri=model_uri(report.model), html=html, **pages)


# --- live training ------------------------------------------------------------------------------------------


def training_key(name: str) -> str:
    """Prefect takes lower-case letters, digits and dashes."""
    return f"training-{re.sub('[^a-z0-9]+', '-', name.lower())}"


class LiveTraining:
    """The progress of one arm in percent, with its latest loss: at most one update in 5 seconds, and none after one failed."""

    def __init__(self, name: str) -> None:
        self.key = training_key(name)
        self.artifact: UUID | None = None
        self.next_update = 0.0
        self.works = True

    def show(self, event: WorkerEvent) -> None:
        """Take an event of a worker: only its steps count."""
        if event["event"] != "step" or not self.works:
            return
        if time.monotonic() >= self.next_update or event["step"] == event["of"]:
            self.works = False
            self._update(event["step"], event["of"], event["loss_nats"])

    @best_effort(_FAILED)
    def _update(self, step: int, of: int, loss_nats: float) -> None:
        percent, line = 100 * step / of, f"step {step} of {of}, loss {loss_nats:.3f} nats/token"
        if self.artifact is None:
            self.artifact = cast(UUID, create_progress_artifact(percent, self.key, line))
        else:
            update_progress_artifact(self.artifact, percent, line)
        self.next_update = time.monotonic() + _SECONDS_BETWEEN_UPDATES
        self.works = True


# --- pieces -------------------------------------------------------------------------------------------------


def _markdown(key: str, template: str, **values: Any) -> None:
    text = environment(backslashed).get_template(template).render(**values)
    create_markdown_artifact(text.strip() + "\n", key)


def _gate_row(gate: GateResult) -> dict[str, str]:
    """Prefect renders a cell as Markdown, in which a lone dash is a list."""
    cells = {
        "gate": gate.name,
        "must be": needs(gate) if gate.direction else "",
        "is": "" if gate.actual is None else plain_number(gate.actual),
        "interval": plain_interval(gate.interval) if gate.interval else "",
        "verdict": gate.verdict,
        "why": gate.why,
    }
    return {name: backslashed(text) for name, text in cells.items()}


def _curve(arm: TrainReport) -> list[dict[str, Any]]:
    """The loss over a tenth of the steps a row, and the last validation loss in it."""
    length = -(-len(arm.loss) // _CURVE_ROWS) or 1
    parts: list[list[LossPoint]] = [arm.loss[start : start + length] for start in range(0, len(arm.loss), length)]
    return [
        {
            "first": part[0].step,
            "last": part[-1].step,
            "loss": sum(point.loss_nats for point in part) / len(part),
            "validation": next(
                (p.nll_nats for p in reversed(arm.validation) if part[0].step <= p.step <= part[-1].step), None
            ),
            "seconds": sum(point.seconds for point in part),
        }
        for part in parts
    ]
