"""The page of `tunegate run --dry-run`: every setting with its origin, what is decided at run time, the stages."""

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from data_contracts.errors import DataError
from data_contracts.run_spec import RunSpec
from data_contracts.train_spec import without_effect
from flows.config.load import LoadedSpec, yaml_inline
from flows.config.validation_errors import all_settings
from tasks.data.ingestion.sources import find_sources

if TYPE_CHECKING:
    from rich.console import Console

STAGES = {
    "ingest": "read the sources into an immutable snapshot",
    "validate": "repairs, row rules, quarantine, the batch contract",
    "benchmarks": "the items of further lm-eval tasks, which no training row may hold",
    "curate": "drop duplicates, split, decontaminate, and remember it all in the ledger",
    "prepare_base": "the base model in the store, named by its content",
    "init_adapter": "the step-0 adapter every arm starts from",
    "choose_start": "if asked for: the champion's adapter, the rows new to it, and old ones to replay",
    "check_tasks": "find further lm-eval tasks and their data before hours are spent",
    "train": "one worker process for each arm, in the same data order",
    "evaluate": "lm-eval on base, arms and champion, the base loaded once",
    "compare": "paired intervals: retention, memory, speed",
    "serve_alone": "if a gate asks: the candidate's time and memory in a process of its own",
    "gate": "pass, fail or inconclusive",
    "record": "MLflow: a parent run, a child for each arm",
    "register": "a model version under the alias challenger",
    "load_back": "a fresh process loads the version: does it answer as it was evaluated",
    "promote": "the alias champion, only if the gates passed",
    "report": "one HTML page",
}


def planned_run(loaded: LoadedSpec) -> dict[str, Any]:
    """What a run would do, without doing it. Raises DataError if its sources are not there."""
    problems = find_sources(loaded.spec.data)[1]
    if problems:
        raise DataError(*problems)
    return {
        "source": loaded.source,
        "spec": loaded.spec.model_dump(mode="json"),
        "origins": loaded.origins,
        "automatic": automatic(loaded.spec),
        "without_effect": ignored(loaded),
        "stages": [{"name": name, "does": does} for name, does in STAGES.items()],
    }


def automatic(spec: RunSpec) -> dict[str, str]:
    """What is decided at run time, and how; each choice is printed with its reason and saved with the run."""
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


def ignored(loaded: LoadedSpec) -> dict[str, str]:
    """Settings that the user set and that no arm reads, with the reason."""
    keys = (f"train.{setting}" for setting in without_effect(loaded.spec.train))
    set_by = {key: loaded.origins[key] for key in keys if loaded.origins[key] != "default"}
    return {key: f"set by {origin}, and read by lora and qlora only" for key, origin in set_by.items()}


def show_dry_run(loaded: LoadedSpec, console: "Console") -> None:
    table = Table(title=f"dry run of {loaded.source}", title_justify="left", title_style="bold")
    for name in ("setting", "value", "from"):
        table.add_column(name, overflow="fold")
    values = loaded.spec.model_dump(mode="json")
    for key in all_settings():
        section, _, field = key.partition(".")
        origin = loaded.origins[key]
        value = yaml_inline(values[section][field])
        table.add_row(key, Text(value), Text(origin), style="dim" if origin == "default" else "")
    console.print(table)
    sections = {"decided at run time": automatic(loaded.spec), "without effect": ignored(loaded), "stages": STAGES}
    for title, lines in sections.items():
        if lines:
            console.print(Text(title, style="bold"))
        for name, text in lines.items():
            console.print(Text(f"  {name:<16} {text}"), soft_wrap=True)
    console.print("nothing was run and nothing was written")
