"""Why a stage ran: the parts of its cache key, compared with those of the last run."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from data_contracts.data_reports import CheckedRows, Report
from data_contracts.run_spec import RunSpec
from data_contracts.stage_inputs import StageInputs
from tasks.data.curation import row_ledger as ledger
from tasks.pipeline.policies import NOT_IDENTITY, POLICIES, plain
from tasks.runtime.core.files import write_atomically
from tasks.runtime.fingerprint import code_digests, library_versions
from tasks.runtime.store import Store

FIRST, FORCED, GONE = "first time", "forced", "its cached result is gone"

_MOST: Final = 3  # differences, and names in one, that are named one by one
_VALUE_CHARS: Final = 40
_SECTIONS: Final = {field.annotation: f"{name}." for name, field in RunSpec.model_fields.items()} | {RunSpec: ""}
# What an argument of tasks/pipeline/stages.py is called, or a field of its groups (data_contracts/stage_inputs.py). What earlier
# stages have made follows from their reasons: a word will do.
_MADE: Final = {
    "snapshot": "data", "validated": "data", "dataset": "data", "rows": "data", "validation": "data", "test": "data",
    "train": "data", "held_out": "data", "origin": "champion",
    "reference": "the batch before", "benchmarks": "benchmark items", "task_files": "your own tasks",
    "base": "base", "step0": "start adapter", "candidate": "adapter", "arms": "adapter", "target": "adapter", "targets": "adapter",
    "evaluations": "scores", "scores": "scores", "comparison": "comparison", "gate": "verdict", "served": "serving",
    "recorded": "MLflow run", "model": "model version", "loaded_back": "answer",
}  # fmt: skip
_GIVEN: Final = {
    "sources": "", "promises": "contract of ", "settings": "train.", "tasks": "evaluate.tasks", "identity": "files of the base",
    "base": "model.base", "revision": "model.revision", "precision": "model.precision", "scope": "model.name",
    "seed": "train.seeds", "method": "train.methods", "max_tokens": "train.max_tokens", "confidence": "gates.confidence",
    "sample_tokens": "evaluate.sample_tokens", "contradictions": "rules.actions.contradiction",
}  # fmt: skip
KeyParts = dict[str, str]


@dataclass(frozen=True)
class Reasons:
    """The last parts of every stage of one flow and model, in STORE/store/keys/."""

    store: Store
    model: str
    flow: str

    def why(self, stage: str, label: str, arguments: dict[str, Any]) -> str:
        """Why this stage, which was not cached, ran. Ask when it has ended well, before `keep`."""
        last = self._last(label)
        if last is None:
            return FIRST
        lines = _differences(last["parts"], key_parts(stage, arguments))
        data = _data(arguments)
        if data and data.snapshot_id != last["snapshot"]:
            lines = [line + self._new_rows(data) if line == "data changed" else line for line in lines]
        return _listed(lines) or GONE

    def keep(self, stage: str, label: str, arguments: dict[str, Any]) -> None:
        """Remember the parts for the next time."""
        file = self._file(label)
        file.parent.mkdir(parents=True, exist_ok=True)
        data = _data(arguments)
        made_of = {"snapshot": data.snapshot_id if data else None, "parts": key_parts(stage, arguments)}
        write_atomically(file, json.dumps(made_of, indent=0))

    def _last(self, label: str) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            return dict(json.loads(self._file(label).read_text()))
        return None

    def _file(self, label: str) -> Path:
        names = (quote(name, safe=" ") for name in (self.model, self.flow, f"{label}.json"))
        return self.store.files.joinpath("keys", *names)

    def _new_rows(self, data: CheckedRows) -> str:
        new = ledger.new_rows(self.store, self.model, data.snapshot_id)
        return "" if new is None else f": {new:,} new {'row' if new == 1 else 'rows'} of {data.rows_in:,}"


def _data(arguments: dict[str, Any]) -> CheckedRows | None:
    return next((value for value in one_by_one(arguments).values() if isinstance(value, CheckedRows)), None)


def one_by_one(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with each group of them (StageInputs) replaced by its fields."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        found |= dict(value) if isinstance(value, StageInputs) else {name: value}
    return found


def key_parts(stage: str, arguments: dict[str, Any]) -> KeyParts:
    """Every part of a stage's key, by a readable name."""
    policy = POLICIES[stage]
    found: KeyParts = {}
    for name, value in one_by_one(arguments).items():
        if name not in NOT_IDENTITY:
            found |= _made(name, value) if _is_made(name, value) else dict(_given(name, value))
    found |= {f"code {name}": digest for name, digest in code_digests(policy.code).items()}
    found["code version of the stage"] = str(policy.version)
    return found | {f"version {name}": number for name, number in library_versions(policy.libraries).items()}


def _is_made(name: str, value: Any) -> bool:
    """Whether earlier stages have made it, or would have."""
    if isinstance(value, list | tuple) and value:
        return any(_is_made(name, item) for item in value)
    return isinstance(value, Report) or (not value and name in _MADE)


def _made(name: str, value: Any) -> KeyParts:
    # Several arguments may be called alike: the argument's name keeps them apart.
    return {f"made {_MADE.get(name, name.replace('_', ' '))}/{name}": _digest(plain(value))}


def _given(name: str, value: Any) -> Iterator[tuple[str, str]]:
    label = _SECTIONS.get(type(value), _GIVEN.get(name, name.replace("_", " ")))
    content = plain(value)
    if not isinstance(content, dict):
        yield label, _text(content)
        return
    for path, leaf in _leaves(content):
        yield label + path, _text(leaf)


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{path}", leaf) for path, leaf in _leaves(value))
        else:
            yield name, value


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _VALUE_CHARS else _digest(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- in words -----------------------------------------------------------------------------------------------


def _differences(last: KeyParts, now: KeyParts) -> list[str]:
    """One line for each: settings first, then what earlier stages made, code, libraries."""
    changed = sorted((name for name in last.keys() | now.keys() if last.get(name) != now.get(name)), key=str.casefold)
    kinds: dict[str, list[str]] = {"": [], "made": [], "code": [], "version": []}
    for name in changed:
        kind, _, rest = name.partition(" ")
        kinds[kind if kind in kinds else ""].append(rest if kind in kinds else name)
    lines = [_setting(name, last.get(name), now.get(name)) for name in kinds[""]]
    lines += dict.fromkeys(f"{name.partition('/')[0]} changed" for name in kinds["made"])
    if kinds["code"]:
        is_elsewhere = not any(name.startswith("code ") and name in now for name in last)
        lines.append(f"code changed: {'every module has another name' if is_elsewhere else _listed(kinds['code'])}")
    return lines + [
        f"{name} {last.get(f'version {name}')} -> {now.get(f'version {name}')}" for name in kinds["version"]
    ]


def _setting(name: str, before: str | None, now: str | None) -> str:
    if _is_digest(before) or _is_digest(now):
        return f"{name} {'is new' if before is None else 'is gone' if now is None else 'changed'}"
    return f"{name} {'unset' if before is None else before} -> {'unset' if now is None else now}"


def _is_digest(text: str | None) -> bool:
    return text is not None and re.fullmatch("[0-9a-f]{64}", text) is not None


def _listed(lines: list[str]) -> str:
    shown = ", ".join(lines[:_MOST])
    return f"{shown} and {len(lines) - _MOST} more" if len(lines) > _MOST else shown
