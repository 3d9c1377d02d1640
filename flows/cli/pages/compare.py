"""Finished runs side by side, of any age: their models, and where they answered the same items, their difference."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from data_contracts.errors import ConfigError, Problem
from data_contracts.reports import EvalReport, RunReport
from data_contracts.run_spec import GateSpec
from data_contracts.verdict import Estimate
from flows.cli.pages.payloads import summary
from flows.cli.pages.tables import COLOURS, show_finished_run
from tasks.evaluation.compare import loss_difference
from tasks.reporting.finished_runs import find_report, store_of
from tasks.reporting.sentences import estimate, number
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Runs:
    """against_first: the loss of the first run's released adapter minus this one's, or why there is none."""

    reports: list[RunReport]
    against_first: list[Estimate | str]

    def payload(self) -> dict[str, Any]:
        differences = [item if isinstance(item, str) else item.model_dump(mode="json") for item in self.against_first]
        return {"runs": [summary(report) for report in self.reports], "against_first": differences}


def compared(root: Path, run_ids: list[str]) -> "tuple[dict[str, Any], Callable[[Console], None]]":
    """JSON and page of one run, by default the newest, or of several side by side."""
    if len(run_ids) > 1:
        runs = compare_runs(root, run_ids)
        return runs.payload(), partial(show_runs, runs)
    report = find_report(Store(root), run_ids[0] if run_ids else None)
    return summary(report), partial(show_finished_run, report)


def compare_runs(root: Path, run_ids: list[str]) -> Runs:
    """Raises ConfigError for a run that is not there, all of them at once."""
    reports: list[RunReport] = []
    problems: list[Problem] = []
    for run_id in run_ids:
        try:
            reports.append(find_report(Store(root), run_id))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    first = (store_of(reports[0]), _released(reports[0]))
    others = [loss_difference(*first, store_of(other), _released(other), gates_of(other)) for other in reports[1:]]
    return Runs(reports, ["", *others])


def gates_of(report: RunReport) -> GateSpec:
    return GateSpec.model_validate(report.spec["gates"])


def _released(report: RunReport) -> EvalReport:
    return next(item for item in report.evaluations if item.target == report.comparison.released)


def show_runs(runs: Runs, console: "Console") -> None:
    """One column for each run, in the order they were named."""
    table = Table()
    table.add_column("")
    for report in runs.reports:
        table.add_column(report.run_id, justify="right", overflow="fold")
    for label, values in _rows(runs):
        table.add_row(label, *values)
    verdicts = [report.gate.verdict for report in runs.reports]
    table.add_row("verdict", *(Text(verdict, style=COLOURS[verdict]) for verdict in verdicts))
    console.print(table)


def _rows(runs: Runs) -> list[tuple[str, list[str]]]:
    found = [report.comparison for report in runs.reports]
    return [
        ("model", [f"{report.model.name} version {report.model.version}" for report in runs.reports]),
        ("data", [report.dataset.snapshot_id[:12] for report in runs.reports]),
        ("base", [report.base.name for report in runs.reports]),
        ("released adapter", [item.released for item in found]),
        ("held-out items, seeds", [f"{item.items:,}, {item.seeds}" for item in found]),
        ("its held-out loss, nats/token", [number(_released(report).nll_nats) for report in runs.reports]),
        ("gain over the base", [estimate(item.gain) if item.gain else "-" for item in found]),
        ("share of LoRA's gain kept", [estimate(item.retention, ".1%") if item.retention else "-" for item in found]),
        ("loss below the first run's", [item if isinstance(item, str) else estimate(item, "+.3f") for item in runs.against_first]),
    ]  # fmt: skip
