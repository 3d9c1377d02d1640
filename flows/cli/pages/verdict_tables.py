"""Pages for people: what was found of the models beside each other, and what the gates say of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from data_contracts.verdict import Comparison, GateReport
from tasks.reporting.sentences import estimate, interval, label_of, number, p_value, sentences

if TYPE_CHECKING:
    from rich.console import Console

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
        table.add_row(claim.claim, Text(claim.verdict, style=_CLAIM_COLOURS[claim.verdict]), Text(claim.told))
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
