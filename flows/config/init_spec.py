"""`tunegate init`: inspect a user's data and write a preset and a data contract that fit it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.data_spec import ContractSpec, DataSpec
from data_contracts.errors import ConfigError, DataError, Problem
from data_contracts.run_spec import RunSpec
from flows.config.load import DEFAULT_PRESET, load_changes, load_spec, write_new, write_spec
from tasks.data.ingestion.preflight import probe
from tasks.data.ingestion.readers import read_source
from tasks.data.ingestion.sources import Source, find_sources, local_copies
from tasks.data.validation.propose import Proposed, RowSample, draw, propose
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from rich.console import Console


# Names people give the two columns that matter, the most specific first.
_PROMPTS = ("prompt", "question", "query", "ask", "instruction", "problem", "input", "user", "message")
_COMPLETIONS = ("completion", "answer", "response", "reply", "output", "solution", "assistant", "resolution")
_SHOWN_CHARS = 200
_SHOWN_REASONS = 5
_ROLES = {
    "alpaca": {"prompt": "instruction + input", "completion": "output", "system": "system (optional)"},
    "sharegpt": {"turns": "conversations[].from / value"},
    "messages": {"turns": "messages[].role / content"},
    "prompt_completion": {"prompt": "prompt", "completion": "completion"},
}


@dataclass(frozen=True)
class WrittenPreset:
    """What `tunegate init` found in the data, and the files it wrote."""

    file: Path
    suite: Path | None
    formats: dict[str, str]
    sample: RowSample
    columns: dict[str, str]
    example: dict[str, Any]
    proposed: Proposed

    @property
    def rejected(self) -> float:
        """The share of the sample that the row rules reject."""
        return sum(self.proposed.reasons.values()) / max(1, self.proposed.rows)

    def payload(self) -> dict[str, Any]:
        found = {"formats": self.formats, "rows": self.sample.counts, "unreadable": self.sample.unreadable}
        checked = {"rows": self.proposed.rows, "quarantined": self.rejected, "reasons": self.proposed.reasons}
        proposed = [item._asdict() for item in self.proposed.proposals]
        written = {"file": str(self.file), "suite": self.suite and str(self.suite)}
        return {
            **written,
            **found,
            "columns": self.columns,
            "example": self.example,
            "sample": checked,
            "proposed": proposed,
        }


def write_preset(file: Path, data: str, name: str | None, base: str | None, overrides: list[str]) -> WrittenPreset:
    """Write a preset and a suite for `data`; raise ConfigError, and write nothing, if its columns cannot be mapped."""
    if file.suffix not in (".yaml", ".yml"):
        what = f"{file.name} has no .yaml ending"
        raise ConfigError(Problem(what, limit=".yaml or .yml", act=f"tunegate init {file}.yaml --data {data}"))
    suite = file.with_suffix(".suite.json")
    _refuse_to_overwrite(file, suite)
    spec = _start(data, name or re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "model", base, overrides)
    sources, problems = find_sources(spec.data)
    if problems:
        raise ConfigError(*problems)
    sources = local_copies(Store.of(spec.store), sources)
    spec, formats = _mapped(spec, sources)
    sample = draw(sources, formats, spec.data)
    proposed = propose(sample, spec, suite)
    columns = spec.data.columns or _ROLES.get(next(iter(formats.values()), ""), {})
    example = {str(key): value for key, value in _first(sources[0], spec.data).items()} if sample.rows else {}
    written = WrittenPreset(file, suite if proposed.suite else None, formats, sample, columns, example, proposed)
    _write_files(written, data)
    return written


def _refuse_to_overwrite(*files: Path) -> None:
    act = "give another name, or delete it yourself"
    problems = [Problem("is there already", str(f), "init overwrites nothing", act) for f in files if f.exists()]
    if problems:
        raise ConfigError(*problems)


def _write_files(written: WrittenPreset, data: str) -> None:
    """Both files or none."""
    rows = sum(written.sample.counts.values())
    limits = [f"{item.name}: {item.why}" for item in written.proposed.proposals if not item.name.startswith("expect_")]
    head = [f"tunegate run {written.file}\n", f"Written by `tunegate init` for {data}: {rows} rows.", *limits]
    if written.suite:
        write_new(written.suite, json.dumps(written.proposed.suite, indent=2, ensure_ascii=False) + "\n")
    try:
        write_spec(written.file, written.proposed.spec, "\n".join(head))
    except ConfigError:
        if written.suite:
            written.suite.unlink()
        raise


def _start(data: str, name: str, base: str | None, overrides: list[str]) -> RunSpec:
    """Defaults for a base you name; the demo's measured settings for the default base."""
    given = [f"data.source={data}", f"model.name={name}", *([f"model.base={base}"] if base else []), *overrides]
    spec = load_changes(given)
    if spec.model.base != RunSpec().model.base:
        return spec
    demo = load_spec(DEFAULT_PRESET, []).spec
    tuned = [
        f"train.learning_rate={demo.train.learning_rate}",
        f"gates.min_retention={demo.gates.min_retention}",
        f"gates.max_accuracy_drop={demo.gates.max_accuracy_drop}",
        f"gates.min_stop_rate={demo.gates.min_stop_rate}",
    ]
    return load_changes([*tuned, *given])


def _mapped(spec: RunSpec, sources: list[Source]) -> tuple[RunSpec, dict[str, str]]:
    """The spec, with columns guessed by their names if the format has none of the known shapes."""
    formats, problems = probe(sources, spec.data)
    if not problems:
        return spec, formats
    guess = {} if spec.data.columns else _guess(_first(sources[0], spec.data))
    if guess:
        data = spec.data.model_copy(update={"columns": guess})
        formats, still = probe(sources, data)
        if not still:
            return spec.model_copy(update={"data": data}), formats
    raise ConfigError(*problems)


def _guess(row: Mapping[str, Any]) -> dict[str, str]:
    """Column names for prompt and completion, or nothing if either is in doubt."""
    by_name = {str(field).lower(): str(field) for field, value in row.items() if isinstance(value, str)}
    prompt = next((by_name[name] for name in _PROMPTS if name in by_name), None)
    completion = next((by_name[name] for name in _COMPLETIONS if name in by_name), None)
    return {"prompt": prompt, "completion": completion} if prompt and completion else {}


def _first(source: Source, data: DataSpec) -> Mapping[str, Any]:
    """The first readable record, or an empty one."""
    try:
        values = [row.value for row in islice(read_source(source, data), 100)]
    except DataError:  # the probe has reported what is wrong with the file
        return {}
    return next((value for value in values if isinstance(value, Mapping)), {})


def show_preset(written: WrittenPreset, console: "Console") -> None:
    from rich.text import Text

    for name, count in written.sample.counts.items():
        console.print(Text(f"{name}: {count:,} rows, format {written.formats.get(name, 'built in')}"), soft_wrap=True)
    if written.sample.unreadable:
        line = f"{written.sample.unreadable:,} records cannot be read; they would be quarantined"
        console.print(Text(line, style="yellow"))
    for part, column in written.columns.items():
        console.print(Text(f"  {part:<12} <- {column}"), soft_wrap=True)
    console.print(Text("first row", style="bold"))
    for field, value in written.example.items():
        text = " ".join(str(value).split())
        console.print(Text(f"  {field:<12} {text[:_SHOWN_CHARS]}{'...' if len(text) > _SHOWN_CHARS else ''}"))
    if written.proposed.proposals:
        _show_proposals(written, console)
    files = f"{written.file} and {written.suite}" if written.suite else f"{written.file}"
    console.print(Text(f"wrote {files}; next: tunegate run {written.file} --dry-run, then without it"), soft_wrap=True)


def _show_proposals(written: WrittenPreset, console: "Console") -> None:
    """The limits and where they come from; above the usual budget, loudly what would be lost."""
    from rich.table import Table
    from rich.text import Text

    rows = f"{written.proposed.rows:,} of {sum(written.sample.counts.values()):,} rows"
    table = Table(title=f"proposed contract, from {rows}", title_justify="left", title_style="bold")
    table.add_column("promise", no_wrap=True)
    for name in ("limit", "observed", "headroom"):
        table.add_column(name, overflow="fold")
    for item in written.proposed.proposals:
        value = ", ".join(item.value) if isinstance(item.value, list) else str(item.value)
        name = item.name.removeprefix("expect_column_")
        table.add_row(Text(name), Text(value), Text(item.observed), Text(item.headroom))
    console.print(table)
    if written.rejected <= ContractSpec().max_quarantine_rate:
        return
    style = "bold red"
    console.print(Text(f"{written.rejected:.1%} of these rows would go to quarantine:", style=style))
    for reason, count in list(written.proposed.reasons.items())[:_SHOWN_REASONS]:
        line = f"  {reason:<20} {count:,}, first: {written.proposed.examples[reason][0]}"
        console.print(Text(line, style=style), soft_wrap=True)
    budget = written.proposed.spec.contract.max_quarantine_rate
    then = "lets the rest train" if written.rejected <= budget else "will stop the run"
    line = f"contract.max_quarantine_rate={budget} {then}: repair the source, or decide what is right"
    console.print(Text(line, style=style), soft_wrap=True)
