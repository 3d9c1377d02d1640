"""Pages for people: a run's models side by side, its data, what to do next. Text from data is never read as markup."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from data_contracts.reports import EvalReport, ModelVersion, RunReport, Stage
from tasks.reporting.finished_runs import html_file, store_of
from tasks.reporting.links import model_uri
from tasks.reporting.sentences import label_of, start_sentence
from tasks.reporting.tables import cost_rows, models_by_name, score_rows

if TYPE_CHECKING:
    from rich.console import Console
from typing import TYPE_CHECKING

from data_contracts.verdict import Comparison, GateReport
from tasks.reporting.sentences import estimate, interval, number, p_value, sentences

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
    models = models_by_name(report.arms, report.evaluations)
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
    models = models_by_name(report.arms, report.evaluations)
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
            console.print(Text(f"  {arm.name} {start_sentence(arm.start)}"), soft_wrap=True)


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


COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
_CLAIM_COLOURS = {"holds": "green", "does not hold": "red", "cannot tell": "yellow"}
_NONE = "-"


def show_decision(report: GateReport, comparison: Comparison | None, console: "Console") -> None:
    if comparison:
        show_comparison(comparison, console)
    show_gate(report, console)


def show_comparison(found: Comparison, console: "Console", note: str = "") -> None:
    """Every difference with its interval, then slices, tasks beyond the domain, and the popular claims."""
    grouped = f" in {found.clusters} clusters" if found.clusters != found.items else ""
    seeds = f", {found.seeds} seeds" if found.seeds > 1 else ""
    head = f"\nthe same {found.items} held-out items{grouped} for every model, paired{seeds}"
    console.print(Text(head, style="bold"))
    for line in sentences(found):
        console.print(Text(f"  {line}"), soft_wrap=True)
    if note:
        console.print(Text(f"  base: {note}", style="dim"), soft_wrap=True)
    if found.slices:
        rows = [(f"{s.kind}: {s.name}", f"{s.items:,}", estimate(s.gain)) for s in found.slices]
        _table("slices", ("", "items", "loss below the base's"), rows, console)
    if found.general:
        tasks = [
            (
                c.task,
                c.metric,
                f"{c.items:,}",
                number(c.base),
                number(c.candidate),
                estimate(c.change, "+.3f"),
                p_value(c.p),
            )
            for c in found.general
        ]
        titles = ("", "metric", "items", "base", label_of(found.candidate), "better by", "p (Holm)")
        _table("beyond the domain", titles, tasks, console)
    _show_claims(found, console)


def _table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], console: "Console") -> None:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    for place, name in enumerate(titles):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _show_claims(found: Comparison, console: "Console") -> None:
    """What articles say of QLoRA, each beside what this run measured."""
    table = Table(title="\nclaims, held against this run", title_justify="left", title_style="bold")
    for name in ("QLoRA ...", "here", "measured"):
        table.add_column(name)
    for claim in found.claims:
        table.add_row(claim.claim, Text(claim.verdict, style=_CLAIM_COLOURS[claim.verdict]), Text(claim.note))
    if found.claims:
        console.print(table)


def show_gate(report: GateReport, console: "Console") -> None:
    table = Table(title="\ngates", title_justify="left", title_style="bold")
    for name in ("gate", "must be", "is", "interval", "verdict", "why"):
        table.add_column(name, justify="right" if name in ("is", "interval") else "left")
    for item in report.gates:
        verdict = Text(item.verdict, style=COLOURS[item.verdict])
        needs = f"{item.direction} {number(item.threshold)}" if item.direction else _NONE
        spread = interval(item.interval) or _NONE
        table.add_row(item.name, needs, number(item.actual), spread, verdict, Text(item.why))
    console.print(table)
    if report.off:
        console.print(Text(f"not judged: {'; '.join(report.off)}", style="dim"), soft_wrap=True)
    console.print(Text.assemble("verdict: ", (report.verdict.upper(), f"bold {COLOURS[report.verdict]}")))
