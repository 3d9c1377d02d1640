"""The run's report: one HTML page with plots, kept in the store and in MLflow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_contracts.reports import EvalReport, ModelVersion, RecordedRun
from data_contracts.run_spec import RunSpec
from data_contracts.stage_inputs import RunResult
from data_contracts.verdict import Interval
from tasks.reporting.plots import figures, svg
from tasks.reporting.sentences import sentences, start_sentence
from tasks.reporting.tables import PARTS, choices, memory_parts
from tasks.runtime.mlflow_client import attach_file
from tasks.runtime.store import Store, content_key


def write_html_report(
    store: Store, spec: RunSpec, result: RunResult, recorded: RecordedRun, model: ModelVersion
) -> str:
    """Write report.html, log it to the parent run, and return its path relative to the store."""
    arms, comparison = result.arms, result.comparison
    page = _environment().get_template("report.html.j2").render(
        spec=spec,
        dataset=result.dataset,
        arms=arms,
        trained={arm.name: arm for arm in arms},
        evaluations=result.evaluations,
        comparison=comparison,
        gates=result.gate,
        recorded=recorded,
        model=model,
        answers=_answers(result.evaluations),
        choices={arm.name: choices(arm) for arm in arms},
        memory={arm.name: memory_parts(arm) for arm in arms},
        parts=PARTS,
        sentences=list(sentences(comparison)),
        starts=[f"{arm.name} {start_sentence(arm.start)}" for arm in arms if arm.start],
        plots={name: svg(figure) for name, figure in figures(arms, comparison).items()},
    )  # fmt: skip
    name = content_key(page)[:16]
    with store.publish("reports", name) as folder:
        (folder / "report.html").write_text(page, encoding="utf-8")
    attach_file(spec.store, recorded.mlflow_run_id, store.path(f"reports/{name}/report.html"))
    return f"reports/{name}/report.html"


def _environment() -> Environment:
    # Everything from data or models is escaped; only our own SVG is marked safe.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["number"] = lambda value: "" if value is None else f"{value:.3f}"
    environment.filters["interval"] = _interval
    environment.filters["estimate"] = lambda found: (
        "" if found is None else f"{found.value:.3f} {_interval(found.interval)}"
    )
    environment.filters["megabytes"] = lambda value: f"{value / 1e6:,.0f}"
    return environment


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _answers(evaluations: Sequence[EvalReport]) -> list[dict[str, Any]]:
    """The sample questions, each with every model's answer."""
    first = evaluations[0].answers
    return [
        {
            "question": sample.question,
            "reference": sample.reference,
            "answers": {report.target: report.answers[index].answer for report in evaluations},
        }
        for index, sample in enumerate(first)
    ]
