"""What `promote`, `rollback` and `history` print, and their JSON. What people wrote is never read as markup."""

from datetime import datetime
from typing import TYPE_CHECKING, Any

from data_contracts.releases import History, Moved, MoveEntry
from data_contracts.reports import ReleaseCheck
from flows.cli.pages.payloads import model_summary
from flows.cli.pages.tables import show_version

if TYPE_CHECKING:
    from rich.console import Console

BROKEN = 4
_UNFINISHED = {"intended": "unfinished", "undone": "not done"}


def moved_summary(found: Moved) -> dict[str, Any]:
    return {**model_summary(found.model), "move": found.move.model_dump(mode="json") if found.move else None}


def show_moved(found: Moved, console: "Console") -> None:
    from rich.text import Text

    show_version(found.model, console)
    if found.move is None:
        console.print("nothing to do: it is champion already")
        return
    move = found.move
    check = move.evidence.check if move.evidence else None
    console.print(Text(f"champion: {move.before or 'none'} -> {move.to}, by {move.who}: {move.why}"), soft_wrap=True)
    console.print(Text(f"checked: {check_line(check)}"), soft_wrap=True)
    for overruled in move.overrode:
        console.print(Text(f"overruled: {overruled}", style="bold red"), soft_wrap=True)


def check_line(check: ReleaseCheck | None) -> str:
    """A check in one line."""
    if check is None:
        return "not checked"
    nats = "nothing to compare" if check.difference_nats is None else f"{check.difference_nats:.1e} nats apart"
    limit = f"at most {check.tolerance_nats:g}"
    alike = f"{check.answered_alike} of {check.questions} answers as evaluated"
    cost = f"{check.ms_per_token:.1f} ms per token, {check.peak_bytes / 1e9:.2f} GB"
    return f"{nats} ({limit}), {alike}, {cost}, {check.precision}"


# --- history ------------------------------------------------------------------------------------------------


def history_summary(found: History) -> dict[str, Any]:
    return found.model_dump(mode="json")


def show_history(found: History, console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("when", "move", "from", "to", "gates", "check", "who", "why"):
        table.add_column(column, overflow="fold")
    for entry in found.entries:
        style = "bold red" if entry.move.overrode else "yellow" if entry.step != "done" else ""
        table.add_row(*(Text(cell, style=style) for cell in _cells(entry)))
    console.print(table)
    champion = f"version {found.champion}" if found.champion else "none"
    console.print(Text(f"champion of {found.name} now: {champion}"), soft_wrap=True)
    _lines(found.unfinished, "yellow", console)
    _lines(found.problems, "bold red", console)


def _lines(lines: list[str], style: str, console: "Console") -> None:
    from rich.text import Text

    for line in lines:
        console.print(Text(line, style=style), soft_wrap=True)


def _cells(entry: MoveEntry) -> list[str]:
    move, evidence = entry.move, entry.move.evidence
    when = datetime.fromtimestamp(move.unix_seconds).astimezone().isoformat(timespec="seconds").replace("T", " ")
    act = "override" if move.overrode else move.act
    state = f", {_UNFINISHED[entry.step]}" if entry.step != "done" else ", elsewhere" if entry.elsewhere else ""
    gates = (evidence and evidence.verdict) or "not kept"
    check = evidence.check if evidence else None
    passed = "not checked" if check is None else "refused" if check.refusals else "passed"
    who = move.who or "not kept"
    why = "; ".join(
        [move.why, *(f"overruled: {rule}" for rule in move.overrode), *([entry.note] if entry.note else [])]
    )
    return [when, f"{act}{state}", move.before or "-", move.to, gates, passed, f"{who}{_by(move.run)}", why]


def _by(run: str | None) -> str:
    return f", run {run}" if run else ""
