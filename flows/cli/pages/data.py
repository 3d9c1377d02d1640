"""The data page: what came in, what was repaired, what was rejected and why, duplicates, splits, drift, the contract."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from data_contracts.data_reports import DatasetManifest, RowStory
from data_contracts.reports import Stage
from data_contracts.rows import LEAKS, UNREADABLE
from flows.cli.pages.payloads import data_summary
from flows.cli.pages.tables import show_stages
from tasks.reporting.links import data_files
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from rich.console import Console

_EXAMPLES = 3
_SHOWN_CHARS = 1000


def show_dataset(data: DatasetManifest, stages: list[Stage], store: Store, console: "Console") -> None:
    """Every row accounted for: kept, in quarantine by reason with examples, or a duplicate."""
    show_stages(stages, console)
    table = Table(title=f"snapshot {data.snapshot_id[:16]}", title_justify="left", title_style="bold")
    table.add_column("rows")
    table.add_column("", justify="right")
    table.add_column("examples", overflow="fold")
    table.add_row("in", f"{data.rows_in:,}")
    table.add_row("kept", f"{data.kept:,}", f"{data.known_rows:,} known from earlier runs keep their split")
    for split, count in data.splits.items():
        table.add_row(f"  {split}", f"{count:,}")
    kinds = f"{data.exact_duplicates:,} exact, {data.near_duplicates:,} near"
    table.add_row("duplicates", f"{data.duplicates:,}", kinds)
    table.add_row("quarantined", f"{data.quarantined:,}")
    _add(table, data.reasons, _examples(store, data))
    if data.repairs:
        table.add_section()
        table.add_row("repaired", "", "one row can need several repairs")
        _add(table, {n: r.rows for n, r in data.repairs.items()}, {n: r.examples for n, r in data.repairs.items()})
    if data.flags:
        table.add_section()
        table.add_row("flagged", "", "kept anyway; --set rules.actions.REASON=quarantine takes them out")
        _add(table, data.flags, {})
    console.print(table)
    for line in (_languages(data), _drift(data), _contamination(data)):
        console.print(line, soft_wrap=True)
    console.print(_contract_line(store, data), soft_wrap=True)
    for label, path in data_files(data, store).items():
        console.print(Text(f"  {label:<16} {path}"), soft_wrap=True)
    if any(reason not in UNREADABLE | LEAKS for reason in data.reasons):
        console.print(Text("a rule was wrong about some rows? tunegate data release --reason REASON --why TEXT"))


def _add(table: Table, counts: Mapping[str, int], examples: Mapping[str, list[str]]) -> None:
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(f"  {name}", f"{count:,}", Text("\n".join(examples.get(name, []))))


def data_payload(data: DatasetManifest, stages: list[Stage], store: Store) -> dict[str, Any]:
    """What `tunegate data --json` prints."""
    return {
        **data_summary(data, stages),
        "reasons": data.reasons,
        "flags": data.flags,
        "repairs": {name: repaired.rows for name, repaired in data.repairs.items()},
        "languages": data.languages,
        "drift": data.drift.model_dump(mode="json"),
        "contamination": data.contamination,
        "contract": contract_summary(data, store),
        "files": {name: str(path) for name, path in data_files(data, store).items()},
    }


def contract_summary(data: DatasetManifest, store: Store) -> dict[str, Any]:
    """The verdict and every expectation that failed, with the ids of the failing rows."""
    results = json.loads(store.path(data.contract_result).read_text(encoding="utf-8"))["results"]
    failed = [item for item in results if not item["success"]]
    return {"verdict": "kept", "expectations": len(results), "warnings": failed}


def _examples(store: Store, data: DatasetManifest) -> dict[str, list[str]]:
    """For each reason the first rows it rejected, as file:line and what was wrong."""
    found: dict[str, list[str]] = {}
    for row in _quarantined(store, data):
        examples = found.setdefault(str(row["reason"]), [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{row['source']}:{row['line']} {row['detail'] or ''}".strip())
    return found


def _quarantined(store: Store, data: DatasetManifest) -> Iterator[dict[str, Any]]:
    with store.path(data.quarantine).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _languages(data: DatasetManifest) -> Text:
    shares = [f"{name} {count / max(1, sum(data.languages.values())):.1%}" for name, count in data.languages.items()]
    return Text(f"languages (? = too short to detect): {', '.join(shares[:8])}")


def _drift(data: DatasetManifest) -> Text:
    if data.drift.reference is None:
        return Text("drift: this is the first batch")
    values = ", ".join(f"{name} {value:.3f}" for name, value in data.drift.values.items())
    return Text(f"drift against snapshot {data.drift.reference[:16]}: {values}")


def _contamination(data: DatasetManifest) -> Text:
    counts = ", ".join(f"{name} {count:,}" for name, count in data.contamination.items()) or "none"
    return Text(
        f"contamination (training rows that share most of an item, taken out; any_13_gram is only counted): {counts}"
    )


def _contract_line(store: Store, data: DatasetManifest) -> Text:
    """Critical expectations were met, or there would be no manifest; the others may have failed."""
    contract = contract_summary(data, store)
    line = Text.assemble("contract: ", ("kept", "green"), f", {contract['expectations']} expectations")
    if failed := [item["name"] for item in contract["warnings"]]:
        line.append(f", {len(failed)} of them only warn: {', '.join(failed)}", style="yellow")
    return line


# --- one row ------------------------------------------------------------------------------------------------


def show_stories(stories: list[RowStory], console: "Console") -> None:
    """What came in, what it became, where it is, and its history. Text from data is never read as markup."""
    for story in stories:
        console.print(Text(f"row {story.row_id}", style="bold"))
        console.print(Text(f"  came in     {story.source}:{story.line}"), soft_wrap=True)
        console.print(Text(f"  raw         {_short(story.raw)}"), soft_wrap=True)
        now = story.now
        place = ", ".join(
            f"{k} {v}" for k, v in now.items() if k not in ("row_id", "source", "line", "messages", "raw")
        )
        console.print(Text(f"  now         {place}"), soft_wrap=True)
        kept = [[message["role"], message["content"]] for message in now.get("messages", [])]
        if kept and kept != story.read:
            for before, after in zip(story.read or [], kept, strict=False):
                if before != after:
                    console.print(Text(f"  repaired    {_short(repr(before[1]))}"), soft_wrap=True)
                    console.print(Text(f"         to   {_short(repr(after[1]))}"), soft_wrap=True)
        for snapshot, fate, reason, split in story.history:
            state = " ".join(part for part in (fate, reason, split and f"({split})") if part)
            console.print(Text(f"  ledger      {state}, since snapshot {str(snapshot)[:16]}"), soft_wrap=True)
        for release in story.releases:
            day = datetime.fromtimestamp(release["at"], UTC).date()
            line = f"{release['reason']} overruled by {release['who']} on {day}: {release['why']}"
            console.print(Text(f"  released    {line}"), soft_wrap=True)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text):,} characters)"
