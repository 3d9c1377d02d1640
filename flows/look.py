"""`tunegate init`: look at somebody's data and write a preset that fits it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.errors import ConfigError, DataError, Problem
from data_contracts.run_spec import DataSpec, RunSpec
from flows.spec_files import DEFAULT_PRESET, load_changes, load_spec, write_spec
from tasks.probes import probe
from tasks.readers import read_source
from tasks.sources import Source, find_sources

if TYPE_CHECKING:
    from rich.console import Console

# Names people give the two columns that matter, most telling first.
_PROMPTS = ("prompt", "question", "query", "ask", "instruction", "problem", "input", "user", "message")
_COMPLETIONS = ("completion", "answer", "response", "reply", "output", "solution", "assistant", "resolution")
_SHOWN_CHARS = 200
_ROLES = {
    "alpaca": {"prompt": "instruction + input", "completion": "output", "system": "system (optional)"},
    "sharegpt": {"turns": "conversations[].from / value"},
    "messages": {"turns": "messages[].role / content"},
    "prompt_completion": {"prompt": "prompt", "completion": "completion"},
}


@dataclass(frozen=True)
class Look:
    """What init found and wrote."""

    file: Path
    formats: dict[str, str]
    rows: dict[str, int]
    unreadable: int
    columns: dict[str, str]
    example: dict[str, Any]

    def payload(self) -> dict[str, Any]:
        found = {"formats": self.formats, "rows": self.rows, "unreadable": self.unreadable}
        return {"file": str(self.file), **found, "columns": self.columns, "example": self.example}


def init(file: Path, data: str, name: str | None, base: str | None, overrides: list[str]) -> Look:
    """Write a preset for `data`; raise ConfigError, and write nothing, if its columns cannot be mapped."""
    if file.suffix not in (".yaml", ".yml"):
        what = f"{file.name} has no .yaml ending"
        raise ConfigError(Problem(what, limit=".yaml or .yml", act=f"tunegate init {file}.yaml --data {data}"))
    spec = _start(data, name or re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "model", base, overrides)
    sources, problems = find_sources(spec.data)
    if problems:
        raise ConfigError(*problems)
    spec, formats = _mapped(spec, sources)
    look = _look(file, spec, sources, formats)
    head = f"tunegate run {file}\n\nWritten by `tunegate init` for {data}: {sum(look.rows.values())} rows."
    write_spec(file, spec, head)
    return look


def _start(data: str, name: str, base: str | None, overrides: list[str]) -> RunSpec:
    """Defaults for a base you name; the demo's measured dials for the default base."""
    given = [f"data.source={data}", f"model.name={name}", *([f"model.base={base}"] if base else []), *overrides]
    spec = load_changes(given)
    if spec.model.base != RunSpec().model.base:
        return spec
    demo = load_spec(DEFAULT_PRESET, []).spec
    tuned = [
        f"train.learning_rate={demo.train.learning_rate}",
        f"gates.min_retention={demo.gates.min_retention}",
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
    except DataError:  # the probe has told what is wrong with the file
        return {}
    return next((value for value in values if isinstance(value, Mapping)), {})


def _look(file: Path, spec: RunSpec, sources: list[Source], formats: dict[str, str]) -> Look:
    rows: dict[str, int] = {}
    unreadable = 0
    for source in sources:
        if source.kind == "builtin":
            continue
        rows[source.name] = 0
        for row in read_source(source, spec.data):
            rows[source.name] += 1
            unreadable += not isinstance(row.value, Mapping)
    known = next(iter(formats.values()), "")
    columns = spec.data.columns or _ROLES.get(known, {})
    example = {str(key): value for key, value in _first(sources[0], spec.data).items()} if rows else {}
    return Look(file, formats, rows, unreadable, columns, example)


def show_look(look: Look, console: "Console") -> None:
    from rich.text import Text

    for name, count in look.rows.items():
        console.print(Text(f"{name}: {count:,} rows, format {look.formats.get(name, 'built in')}"), soft_wrap=True)
    if look.unreadable:
        console.print(Text(f"{look.unreadable:,} records cannot be read; they would be quarantined", style="yellow"))
    for part, column in look.columns.items():
        console.print(Text(f"  {part:<12} <- {column}"), soft_wrap=True)
    console.print(Text("first row", style="bold"))
    for field, value in look.example.items():
        text = " ".join(str(value).split())
        console.print(Text(f"  {field:<12} {text[:_SHOWN_CHARS]}{'...' if len(text) > _SHOWN_CHARS else ''}"))
    console.print(Text(f"wrote {look.file}; next: tunegate run {look.file} --dry-run, then without it"), soft_wrap=True)
