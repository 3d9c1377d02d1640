"""Tables for people: a run's models side by side, every difference, the gates. Text from data is never read as markup."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from data_contracts.reports import EvalReport, ModelVersion, RunReport, Stage
from data_contracts.verdict import Comparison, GateReport
from tasks.reporting.finished_runs import store_of
from tasks.reporting.sentences import estimate, interval, label_of, number, p_value, sentences, start_sentence
from tasks.reporting.tables import cost_rows, models_by_name, score_rows

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
_CLAIM_COLOURS = {"holds": "green", "does not hold": "red"}
_UNDECIDED = "yellow"
_NONE = "-"


def show_run_tables(report: RunReport, console: "Console") -> None:
    """Everything that was measured in a run: models, differences, gates, and one question with its answers."""
    show_models(report, console)
    show_decision_tables(report.gate, report.comparison, console, report.base.note)
    models = models_by_name(report.arms, report.evaluations)
    _show_sample([scores[0] for scores, _ in models.values() if scores], console)
    data_docs = store_of(report).files / report.dataset.data_docs
    console.print(Text(f"\ndata, by Great Expectations: {data_docs}", style="dim"), soft_wrap=True)


def show_decision_tables(report: GateReport, found: Comparison, console: "Console", base_note: str = "") -> None:
    show_comparison(found, console, base_note)
    show_gate(report, console)


def show_stages(stages: Sequence[Stage], console: "Console") -> None:
    """Each stage was reported when it ended; all that is left to say is that none had anything to do."""
    if stages and all(stage.status != "ran" for stage in stages):
        console.print("nothing to do: every stage was done before with the same input (--force runs it all again)")


def show_finished_run(report: RunReport, console: "Console") -> None:
    """A finished run's tables and its version."""
    show_models(report, console)
    show_decision_tables(report.gate, report.comparison, console, report.base.note)
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
    console.print(Text(version_line(model)), soft_wrap=True)


def version_line(model: ModelVersion) -> str:
    return f"registered: {model.name} version {model.version} ({', '.join(model.aliases) or 'no alias'})"


def _show_sample(evaluations: Sequence[EvalReport], console: "Console") -> None:
    """One question, answered by the base and by each tuned model."""
    answers = {item.target: item.answers[0] for item in evaluations if item.answers}
    if not answers:
        return
    first = next(iter(answers.values()))
    console.print(Text("\na held-out question, with each model's answer", style="bold"))
    lines = {"question": first.question, "reference": first.reference}
    lines |= {label_of(target): answer.answer for target, answer in answers.items()}
    for label, text in lines.items():
        console.print(Text(f"  {label:<10} {_one_line(text)}"), soft_wrap=True)


def _one_line(text: str, limit: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


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
    """What articles say of QLoRA, each next to what this run measured."""
    table = Table(title="\nclaims about QLoRA, checked against this run", title_justify="left", title_style="bold")
    for name in ("QLoRA ...", "here", "measured"):
        table.add_column(name)
    for claim in found.claims:
        table.add_row(
            claim.claim, Text(claim.verdict, style=_CLAIM_COLOURS.get(claim.verdict, _UNDECIDED)), Text(claim.note)
        )
    if found.claims:
        console.print(table)


def show_gate(report: GateReport, console: "Console") -> None:
    table = Table(title="\ngates", title_justify="left", title_style="bold")
    for name in ("gate", "must be", "is", "interval", "verdict", "why"):
        table.add_column(name, justify="right" if name in ("is", "interval") else "left")
    for item in report.gates:
        verdict = Text(item.verdict, style=COLOURS[item.verdict])
        limit = f"{item.direction} {number(item.threshold)}" if item.direction else _NONE
        spread = interval(item.interval) or _NONE
        table.add_row(item.name, limit, number(item.actual), spread, verdict, Text(item.why))
    console.print(table)
    if report.off:
        console.print(Text(f"not judged: {'; '.join(report.off)}", style="dim"), soft_wrap=True)
    console.print(Text.assemble("verdict: ", (report.verdict.upper(), f"bold {COLOURS[report.verdict]}")))
