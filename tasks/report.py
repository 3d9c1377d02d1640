"""The run's report: one HTML page with plots, kept in the store and in MLflow."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_contracts.data_reports import DatasetManifest
from data_contracts.reports import Comparison, EvalReport, GateReport, Interval, ModelVersion, RecordedRun, TrainReport
from data_contracts.run_spec import RunSpec
from tasks.drafts import content_key
from tasks.stores import Store
from tasks.tracking import attach

_COLOURS = {
    "lora": "#0969da", "qlora": "#bf3989", "full": "#1a7f37", "prefix": "#9a6700", "champion": "#6e7781", "base": "#6e7781",
}  # fmt: skip


def write_report(
    store: Store,
    spec: RunSpec,
    dataset: DatasetManifest,
    arms: Sequence[TrainReport],
    evaluations: Sequence[EvalReport],
    comparison: Comparison,
    gates: GateReport,
    recorded: RecordedRun,
    model: ModelVersion,
) -> str:
    """Write report.html, log it to the parent run, and return its path relative to the store."""
    page = _environment().get_template("report.html.j2").render(
        spec=spec,
        dataset=dataset,
        arms=arms,
        trained={arm.method: arm for arm in arms},
        evaluations=evaluations,
        comparison=comparison,
        gates=gates,
        recorded=recorded,
        model=model,
        answers=_answers(evaluations),
        losses_svg=plot_losses(arms),
        gains_svg=plot_gains(comparison),
    )  # fmt: skip
    name = content_key(page)[:16]
    with store.publish("reports", name) as folder:
        (folder / "report.html").write_text(page, encoding="utf-8")
    attach(spec.store, recorded.mlflow_run_id, store.path(f"reports/{name}/report.html"))
    return f"reports/{name}/report.html"


def _environment() -> Environment:
    # Everything from data or models is escaped; only our own SVG is marked safe.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["number"] = lambda value: "" if value is None else f"{value:.3f}"
    environment.filters["interval"] = _interval
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


def plot_losses(arms: Sequence[TrainReport]) -> str:
    """Training loss of each arm over the steps, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        steps = [point.step for point in arm.loss]
        axes.plot(steps, [point.loss_nats for point in arm.loss], label=arm.method, color=_COLOURS[arm.method], lw=1.5)
    axes.set(xlabel="optimiser step", ylabel="training loss, nats/token", title="Training loss")
    return _svg(figure, axes, legend=True)


def plot_gains(comparison: Comparison) -> str:
    """How much lower than the base's each model's held-out loss is, with its interval, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.subplots()
    gains = _gains(comparison.nll_nats, comparison.nll_gain_ci95)
    for row, (name, (gain, (low, high))) in enumerate(gains.items()):
        bars = [[max(0.0, gain - low)], [max(0.0, high - gain)]]
        axes.errorbar([gain], [row], xerr=bars, fmt="o", capsize=4, color=_COLOURS.get(name, "#6e7781"))
    axes.axvline(0, color="#6e7781", lw=0.8)
    axes.set_yticks(range(len(gains)), list(gains))
    axes.set_ylim(-0.6, len(gains) - 0.4)
    axes.set(xlabel="held-out loss below the base's, nats/token", title="Gain over the base")
    return _svg(figure, axes, legend=False)


def _gains(nll: Mapping[str, float], intervals: Mapping[str, Interval]) -> dict[str, tuple[float, Interval]]:
    """The champion's interval is against the candidate, so it is not drawn here."""
    return {name: (nll["base"] - nll[name], i) for name, i in intervals.items() if name != "champion"}


def _svg(figure: Any, axes: Any, legend: bool) -> str:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if legend:
        axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
