"""The pages of `tunegate export` (every form next to the live model, which one was written) and of `tunegate shadow`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from data_contracts.exports import Exported
from data_contracts.releases import ShadowReport
from tasks.export.card import TITLES, rows_of
from tasks.reporting.sentences import estimate

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


def show_shadow(found: ShadowReport, file: Path, console: "Console") -> None:
    sides = (found.champion, found.challenger)
    table = Table(title=f"the same {found.prompts:,} questions", title_justify="left", title_style="bold")
    table.add_column("")
    for side in sides:
        table.add_column(Text(side.version), justify="right")
    table.add_row("tokens of an answer", *(f"{side.tokens:.1f}" for side in sides))
    table.add_row("ms per token, median", *(f"{side.ms_per_token:.0f}" for side in sides))
    table.add_row("ended with a stop token", *(estimate(side.stopped) for side in sides))
    console.print(table)
    console.print(f"answers alike: {estimate(found.same)}; ROUGE-L of one to the other: {found.rouge_l:.3f}")
    for one in found.most_different:
        lines = (("question", one.question), ("champion", one.champion), ("challenger", one.challenger))
        console.print(f"\nROUGE-L {one.rouge_l:.3f}")
        for label, text in lines:
            console.print(Text(f"  {label:<11}{' '.join(text.split())}"), overflow="ellipsis", no_wrap=True)
    others = f"; {found.other_pairs} other pairs of versions are in there too" if found.other_pairs else ""
    console.print(Text(f"\n{file}{others}"), soft_wrap=True, style="dim")
