"""Pages for people: a run's models side by side, its data, what to do next. Text from data is never read as markup."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from data_contracts.reports import EvalReport, ModelVersion, RunReport, Stage
from flows.cli.pages.payloads import html_file, store_of
from flows.cli.pages.verdict_tables import show_comparison, show_gate
from tasks.reporting.links import model_uri
from tasks.reporting.sentences import label_of, started
from tasks.reporting.tables import cost_rows, models_of, score_rows

if TYPE_CHECKING:
    from rich.console import Console

_DEFAULT_ROOT = "mlruns"


def show_run(report: RunReport, console: "Console") -> None:
    """The whole story of a run, ending with what to do next."""
    show_stages(report.stages, console)
    show_models(report, console)
    show_comparison(report.comparison, console, report.base.note)
    show_gate(report.gate, console)
    show_version(report.model, console)
    models = models_of(report.arms, report.evaluations)
    _show_sample([scores[0] for scores, _ in models.values() if scores], console)
    _show_next(report, console)


def show_stages(stages: Sequence[Stage], console: "Console") -> None:
    """Each stage was told when it ended; all that is left to say is that none had anything to do."""
    if stages and all(stage.status != "ran" for stage in stages):
        console.print("nothing to do: every stage was done before with the same input (--force runs it all again)")


def show_verdict(report: RunReport, console: "Console") -> None:
    """A finished run's table and verdict, without its stages and next steps."""
    show_models(report, console)
    show_comparison(report.comparison, console, report.base.note)
    show_gate(report.gate, console)
    show_version(report.model, console)


# --- models side by side ------------------------------------------------------------------------------------


def show_models(report: RunReport, console: "Console") -> None:
    table = Table(title=f"run {report.run_id}: {report.base.name}", title_justify="left", title_style="bold")
    table.add_column("")
    models = models_of(report.arms, report.evaluations)
    for name in models:
        table.add_column(label_of(name), justify="right")
    for label, cells in score_rows(models, report.comparison):
        table.add_row(label, *cells)
    table.add_section()
    for label, cells in cost_rows(models):
        table.add_row(label, *cells)
    console.print(table)
    for arm in report.arms:
        if arm.start:
            console.print(Text(f"  {arm.name} {started(arm.start)}"), soft_wrap=True)


def show_version(model: ModelVersion, console: "Console") -> None:
    aliases = ", ".join(model.aliases) or "no alias"
    console.print(Text(f"registered: {model.name} version {model.version} ({aliases})"), soft_wrap=True)


def _show_sample(evaluations: Sequence[EvalReport], console: "Console") -> None:
    """One question, answered by the base and by each tuned model."""
    answers = {item.target: item.answers[0] for item in evaluations if item.answers}
    if not answers:
        return
    first = next(iter(answers.values()))
    console.print(Text("\na held-out question, and who answers what", style="bold"))
    told = {"question": first.question, "reference": first.reference}
    told |= {label_of(target): answer.answer for target, answer in answers.items()}
    for label, text in told.items():
        console.print(Text(f"  {label:<10} {_one_line(text)}"), soft_wrap=True)


def _one_line(text: str, limit: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _show_next(report: RunReport, console: "Console") -> None:
    root = report.spec["store"]["root"]
    store = "" if root == _DEFAULT_ROOT else f" --set store.root={root}"
    question = next((item.answers[0].question for item in report.evaluations if item.answers), "your question")
    asked = _one_line(question, 80).replace('"', "'").replace("`", "")
    steps = {
        "report": str(html_file(report)),
        "data": str(store_of(report).files / report.dataset.data_docs),
        "MLflow, Prefect": f"tunegate ui{store}",
        "ask it": f'tunegate predict "{asked}" --model {model_uri(report.model)}{store}',
    }
    console.print(Text("\nwhere to look next", style="bold"))
    for label, text in steps.items():
        console.print(Text(f"  {label:<16} {text}"), soft_wrap=True)
