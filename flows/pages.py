"""Pages for people before and around a run: its plan, its data, a report over a finished one."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from data_contracts.errors import DataError
from data_contracts.reports import DatasetManifest, Stage
from data_contracts.run_spec import RunSpec
from flows.spec_files import LoadedSpec, yaml_inline
from flows.spec_problems import dials
from flows.tables import show_stages
from tasks.sources import find_sources
from tasks.stores import Store

if TYPE_CHECKING:
    from rich.console import Console

_EXAMPLES = 3
STAGES = {
    "ingest": "read the sources into an immutable snapshot",
    "validate": "row rules, quarantine, the batch contract",
    "curate": "normalise, drop duplicates, split",
    "prepare_base": "the base model in the store, named by its content",
    "init_adapter": "the step-0 adapter every arm starts from",
    "check_tasks": "find further lm-eval tasks and their data before hours are spent",
    "train": "one worker process for each arm, in the same data order",
    "evaluate": "lm-eval on base, arms and champion, the base loaded once",
    "compare": "paired intervals: retention, memory, speed",
    "gate": "pass, fail or inconclusive",
    "record": "MLflow: a parent run, a child for each arm",
    "register": "a model version under the alias challenger",
    "load_back": "a fresh process loads the version and answers a question",
    "promote": "the alias champion, only if the gates passed",
    "report": "one HTML page",
}


def plan(loaded: LoadedSpec) -> dict[str, Any]:
    """What a run would do, without doing it. Raises DataError if its sources are not there."""
    problems = find_sources(loaded.spec.data)[1]
    if problems:
        raise DataError(*problems)
    return {
        "source": loaded.source,
        "spec": loaded.spec.model_dump(mode="json"),
        "origins": loaded.origins,
        "automatic": automatic(loaded.spec),
        "stages": [{"name": name, "does": does} for name, does in STAGES.items()],
    }


def automatic(spec: RunSpec) -> dict[str, str]:
    """What is decided at run time, and by whom; each choice is printed with its reason and saved with the run."""
    chosen = {}
    if spec.data.format == "auto" and not spec.data.columns:
        chosen["data.format"] = "the first rows of each file decide"
    if spec.model.precision == "auto":
        chosen["model.precision"] = "bf16 only where the device has it in hardware (`tunegate doctor` says which)"
    if spec.train.threads is None:
        chosen["train.threads"] = "the cores that are free when a worker starts"
    if spec.model.revision is None and not spec.model.base.startswith("builtin:"):
        chosen["model.revision"] = "the newest, recorded with the run"
    return chosen


def show_plan(loaded: LoadedSpec, console: "Console") -> None:
    table = Table(title=f"dry run of {loaded.source}", title_justify="left", title_style="bold")
    for name in ("dial", "value", "from"):
        table.add_column(name, overflow="fold")
    for key in dials():
        section, _, field = key.partition(".")
        origin = loaded.origins[key]
        value = yaml_inline(getattr(getattr(loaded.spec, section), field))
        table.add_row(key, Text(value), Text(origin), style="dim" if origin == "default" else "")
    console.print(table)
    for title, lines in (("decided at run time", automatic(loaded.spec)), ("stages", STAGES)):
        console.print(Text(title, style="bold"))
        for name, text in lines.items():
            console.print(Text(f"  {name:<16} {text}"), soft_wrap=True)
    console.print("nothing was run and nothing was written")


# --- data ---------------------------------------------------------------------------------------------------


def show_data(data: DatasetManifest, stages: list[Stage], store: Store, console: "Console") -> None:
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
    table.add_row(
        "duplicates", f"{data.duplicates:,}", f"{data.exact_duplicates:,} exact, {data.near_duplicates:,} near"
    )
    table.add_row("quarantined", f"{data.quarantined:,}")
    examples = _examples(store, data)
    for reason, count in sorted(data.reasons.items(), key=lambda item: -item[1]):
        table.add_row(f"  {reason}", f"{count:,}", Text("\n".join(examples.get(reason, []))))
    console.print(table)
    console.print(_contract_line(store, data), soft_wrap=True)
    for label, ref in _files(data).items():
        console.print(Text(f"  {label:<16} {store.files / ref}"), soft_wrap=True)


def _files(data: DatasetManifest) -> Mapping[str, str]:
    names = ("train", "validation", "test", "quarantine", "duplicate_rows", "contract_result")
    return {**{name.replace("_", " "): getattr(data, name).path for name in names}, "data docs": data.data_docs}


def _examples(store: Store, data: DatasetManifest) -> dict[str, list[str]]:
    """For each reason the first rows it rejected, as file:line and what was wrong."""
    found: dict[str, list[str]] = {}
    for row in _quarantined(store, data):
        told = found.setdefault(str(row["reason"]), [])
        if len(told) < _EXAMPLES:
            told.append(f"{row['source']}:{row['line']} {row['detail'] or ''}".strip())
    return found


def _quarantined(store: Store, data: DatasetManifest) -> Iterator[dict[str, Any]]:
    with store.path(data.quarantine).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _contract_line(store: Store, data: DatasetManifest) -> Text:
    """Critical expectations were met, or there would be no manifest; the others may have failed."""
    results = json.loads(store.path(data.contract_result).read_text(encoding="utf-8"))["results"]
    failed = [item["name"] for item in results if not item["success"]]
    line = Text.assemble("contract: ", ("kept", "green"), f", {len(results)} expectations")
    if failed:
        line.append(f", {len(failed)} of them only warn: {', '.join(failed)}", style="yellow")
    return line
