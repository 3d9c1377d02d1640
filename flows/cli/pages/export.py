"""The page of an export: every form beside the live model, which one was written, where."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from data_contracts.exports import Exported
from tasks.export.card import TITLES, rows_of

if TYPE_CHECKING:
    from rich.console import Console


def show_export(found: Exported, to: Path, console: "Console") -> None:
    title = f"{found.model}: {found.items} held-out rows, {found.tokens} answer tokens, all forms computed in fp32"
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, name in enumerate(TITLES):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for row in rows_of(found):
        table.add_row(*map(Text, row))
    console.print(table)
    for note in found.notes:
        console.print(Text(f"  {note}", style="dim"), soft_wrap=True)
    form = f", {found.chosen.label}" if found.chosen else ""
    limit = f"KL {found.written.kl_nats:.2e} of at most {found.tolerance_nats:g} nats"
    console.print(
        Text(f"exported as {found.format}{form} to {to}: read back at {limit}; README.md says how to serve it"),
        soft_wrap=True,
    )
