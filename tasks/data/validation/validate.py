"""Stage 2: every part is repaired and checked, then the batch contract decides whether the rest may be used."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd
import pyarrow.parquet as pq

from data_contracts.data_reports import Drift, FileRef, Repaired, Snapshot, ValidatedData
from data_contracts.data_spec import ContractSpec, RulesSpec
from data_contracts.errors import DataError, Problem
from data_contracts.rows import conversation_from_json
from tasks.data.validation.check_rows import CHECK_LIBRARIES, CheckPart, Releases, check_part, summaries
from tasks.data.validation.contract import ExpectationResult, Suites, load_suites, run_suites
from tasks.data.validation.core.drift import LENGTHS, SHARES, Profile, drift, labels, largest_label_share, profile
from tasks.runtime.fingerprint import code_digest, library_versions
from tasks.runtime.partitions import Part, map_parts
from tasks.runtime.store import Store, content_key, digest, draft_folder, publish_draft

_FILES: Final = ["quarantine.jsonl", "profile.json", "contract.json", "data_docs"]
_NUMBERS: Final = ["row_id", "source", "language", "prompt_chars", "completion_chars", "turns", "answer_hash"]
_EXAMPLES: Final = 3


@dataclass(frozen=True)
class Checks:
    """What rows and batch are held to, and the reasons that a person has overruled."""

    rules: RulesSpec
    contract: ContractSpec
    released: Releases = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides on a single row."""
        released = sorted(self.released)
        return {"rules": self.rules.model_dump(mode="json"), "max_chars": self.contract.max_chars, "released": released}

    def of_part(self, part: Path) -> CheckPart:
        """The work of checking one part of a snapshot."""
        return CheckPart(part, self.rules, self.contract.max_chars, self.released)


class Tally:
    """The counts of all parts together."""

    def __init__(self, folders: list[Path]) -> None:
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        for part in summaries(folders):
            self.rows += part.rows
            self.reasons.update(part.reasons)
            self.flags.update(part.flags)
            self.repairs.update(part.repairs)
            for name, examples in part.examples.items():
                self.examples[name] = (self.examples.get(name, []) + examples)[:_EXAMPLES]


def validate(
    store: Store, snapshot: Snapshot, checks: Checks, reference: tuple[str, FileRef] | None = None,
    engine: str = "local", force: bool = False,
) -> ValidatedData:  # fmt: skip
    """Split the snapshot into kept and quarantined rows and hold the batch to its contract.

    `reference`: snapshot id and profile of the batch before. Everything is published before a failed contract raises
    DataError, so that its rows can be looked at.
    """
    contract = checks.contract
    suites = load_suites(contract.suite, contract.batch_suite)
    folders = map_parts(store, "checked", check_part, _parts(store, snapshot, checks), engine, force)
    tally = Tally(folders)
    numbers = kept_numbers(folders)
    if snapshot.rows_in != len(numbers) + tally.reasons.total():
        raise AssertionError(f"{snapshot.rows_in} rows in, {len(numbers)} kept + {tally.reasons.total()} quarantined")
    now = batch_profile(numbers)
    drifted = _drift(store, now, reference)
    with draft_folder(store, "validated") as draft:
        _join(folders, draft / "quarantine.jsonl")
        (draft / "profile.json").write_text(json.dumps(now), encoding="utf-8")
        batch = _batch(numbers, tally.reasons.total(), now, drifted)
        frames = {"rows": _frame(folders, numbers, draft, suites), "batch": batch}
        outcomes = _hold_to_contract(suites, frames, contract, draft)
        key = content_key(snapshot.id, *(digest(draft / name) for name in _FILES[:3]))
        folder = publish_draft(store, "validated", draft, _FILES, key)
    failed = [item for item in outcomes if not item.success and item.severity == "critical"]
    if failed:
        raise DataError(*_problems(failed, tally, folder / "quarantine.jsonl"))
    return _validated(store, snapshot, folder, _Found(folders, tally, now, drifted))


def _hold_to_contract(
    suites: Suites, frames: dict[str, pd.DataFrame], contract: ContractSpec, draft: Path
) -> list[ExpectationResult]:
    budgets = contract.model_dump(exclude={"suite", "batch_suite"})
    outcomes = run_suites(suites, frames, budgets, draft / "data_docs")
    result = {"parameters": budgets, "results": [item._asdict() for item in outcomes]}
    (draft / "contract.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return outcomes


class _Found(NamedTuple):
    """What was found in a snapshot."""

    parts: list[Path]
    tally: Tally
    profile: Profile
    drift: Drift


def _validated(store: Store, snapshot: Snapshot, folder: Path, found: _Found) -> ValidatedData:
    tally = found.tally
    return ValidatedData(
        snapshot_id=snapshot.id,
        kept=[store.ref(part / "kept.parquet") for part in found.parts],
        quarantine=store.ref(folder / "quarantine.jsonl"),
        rows_in=snapshot.rows_in,
        rows_kept=snapshot.rows_in - tally.reasons.total(),
        reasons=dict(tally.reasons.most_common()),
        flags=dict(tally.flags.most_common()),
        repairs={n: Repaired(rows=rows, examples=tally.examples[n]) for n, rows in tally.repairs.most_common()},
        languages=found.profile["counts"]["language"],
        drift=found.drift,
        profile=store.ref(folder / "profile.json"),
        contract_result=store.ref(folder / "contract.json"),
        data_docs=f"validated/{folder.name}/data_docs/index.html",
        sources=snapshot.sources,
    )


def _parts(store: Store, snapshot: Snapshot, checks: Checks) -> list[Part[CheckPart]]:
    code = [code_digest(("tasks.data.validation.check_rows",)), json.dumps(library_versions(CHECK_LIBRARIES))]
    if checks.rules.function:
        code.append(digest(Path(checks.rules.function.rpartition(":")[0])))
    text = json.dumps(checks.settings, sort_keys=True)
    return [
        Part(content_key(part.sha256, text, *code)[:32], checks.of_part(store.path(part).resolve()))
        for part in snapshot.parts
    ]


def promised(rules: RulesSpec, contract: ContractSpec) -> dict[str, str]:
    """What the stage depends on that its settings only name: the content of the suites and of the rule function's file."""
    suites = load_suites(contract.suite, contract.batch_suite)
    found = {subject: content_key(json.dumps(suite, sort_keys=True)) for subject, suite in suites.items()}
    file = Path((rules.function or "").rpartition(":")[0])
    return found | ({"function": digest(file)} if rules.function and file.is_file() else {})


def _join(folders: list[Path], quarantine: Path) -> None:
    with quarantine.open("wb") as out:
        for folder in folders:
            with (folder / "quarantine.jsonl").open("rb") as part:
                shutil.copyfileobj(part, out)


# --- what expectations see ----------------------------------------------------------------------------------


def kept_numbers(folders: list[Path]) -> pd.DataFrame:
    """Every kept row without its text."""
    columns = [*_NUMBERS, "content_hash"]
    frames = [pq.read_table(folder / "kept.parquet", columns=columns).to_pandas() for folder in folders]
    numbers: pd.DataFrame = pd.concat(frames, ignore_index=True)
    return numbers


def batch_profile(numbers: pd.DataFrame) -> Profile:
    """A few kilobytes that the next batch is compared with; labels as hashes."""
    lengths = {name: numbers[name].tolist() for name in LENGTHS}
    counts = {name: {str(k): int(v) for k, v in numbers[name].value_counts().items()} for name in SHARES}
    by_source = numbers[["source", "answer_hash", "completion_chars"]].groupby("source")
    found = {str(s): labels(g["answer_hash"].to_numpy(), g["completion_chars"].to_numpy()) for s, g in by_source}
    return profile(lengths, counts, found)


def _drift(store: Store, now: Profile, reference: tuple[str, FileRef] | None) -> Drift:
    if reference is None:
        return Drift(reference=None, values={})
    before = json.loads(store.path(reference[1]).read_text(encoding="utf-8"))
    return Drift(reference=reference[0], values=drift(now, before))


def _frame(folders: list[Path], numbers: pd.DataFrame, draft: Path, suites: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row for every row read; rejected ones without lengths, so that their share can be checked.

    The texts are there only if the suite asks for them: a million rows of text are gigabytes.
    """
    kept = numbers.drop(columns="content_hash").assign(quarantined=0)
    asked = json.dumps(suites["rows"])
    if '"column": "prompt"' in asked or '"column": "completion"' in asked:
        texts = [
            conversation_from_json(text)
            for f in folders
            for text in pq.read_table(f / "kept.parquet")["messages"].to_pylist()
        ]
        kept["prompt"] = pd.Series(["\n".join(m.content for m in messages[:-1]) for messages in texts], dtype="str")
        kept["completion"] = pd.Series([messages[-1].content for messages in texts], dtype="str")
    with (draft / "quarantine.jsonl").open(encoding="utf-8") as lines:
        rejected = [(item["row_id"], item["source"]) for item in map(json.loads, lines)]
    rows = pd.DataFrame(rejected, columns=["row_id", "source"], dtype="str").assign(quarantined=1)
    every: pd.DataFrame = pd.concat([kept, rows], ignore_index=True) if len(rows) else kept
    return every


def _batch(numbers: pd.DataFrame, quarantined: int, now: Profile, drifted: Drift) -> pd.DataFrame:
    """One row: rates, label balance and drift of the batch as a whole."""
    distinct = numbers["content_hash"].nunique()
    rows = len(numbers)
    lengths = [drifted.values.get(f"ks_{name}", 0.0) for name in LENGTHS]
    shares = [drifted.values.get(f"kl_{name}", 0.0) for name in SHARES]
    return pd.DataFrame(
        {
            "rows": [rows],
            "quarantine_rate": [quarantined / max(1, rows + quarantined)],
            "duplicate_rate": [1 - distinct / rows if rows else 0.0],
            "largest_label_share": [largest_label_share(now)],
            "length_drift": [max(lengths)],
            "share_drift": [max(shares)],
            "label_drift": [drifted.values.get("kl_label", 0.0)],
        }
    )


# --- what a failed contract says ----------------------------------------------------------------------------


def _problems(failed: list[ExpectationResult], tally: Tally, quarantine: Path) -> Iterator[Problem]:
    for item in failed:
        what = f"{item.name} {'could not be evaluated: ' + item.error if item.error else f'is {item.observed}'}"
        yield Problem(f"{what} ({item.why})", f"contract.{item.suite}, {item.severity}", item.limit, _act(item))
    if tally.reasons:
        reasons = "; ".join(
            f"{reason} {count} (first: {tally.examples[reason][0]})" for reason, count in tally.reasons.most_common(5)
        )
        act = "read them there, each with its reason; `tunegate data release` brings back what is right"
        yield Problem(f"rejected rows by reason: {reasons}", str(quarantine), act=act)


def _act(item: ExpectationResult) -> str:
    """`{observed}` in a suite's act becomes a value that would have passed."""
    if not isinstance(item.observed, int | float):
        return item.act
    passing = item.observed if isinstance(item.observed, int) else math.ceil(item.observed * 100) / 100
    return item.act.replace("{observed}", str(passing))
