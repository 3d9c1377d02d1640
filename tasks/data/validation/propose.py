"""A contract for somebody's data: a sample goes through repairs and row rules, and what comes out proposes the limits."""

import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow.parquet as pq

from data_contracts.data_spec import ContractSpec, DataSpec, RulesSpec
from data_contracts.rows import Reason, Rejection, Row, SnapshotRow, conversation_from_json
from data_contracts.run_spec import RunSpec
from tasks.data.ingestion.core.formats import row_converter
from tasks.data.ingestion.ingest import as_table, snapshot_row
from tasks.data.ingestion.raw_rows import RawRow
from tasks.data.ingestion.readers import read_source
from tasks.data.ingestion.sources import Source
from tasks.data.validation.check_rows import check_part
from tasks.data.validation.contract import load_suite
from tasks.data.validation.core.drift import LENGTHS
from tasks.data.validation.core.languages import language
from tasks.data.validation.core.proposed_limits import (
    Proposal,
    Seen,
    dominant_languages,
    proposed_settings,
    proposed_suite,
)
from tasks.data.validation.core.text_rules import case_of, in_an_allowed_language
from tasks.data.validation.validate import Checks, Tally, batch_profile, kept_numbers
from tasks.runtime.processes import Display

SAMPLE_ROWS: Final = 20_000
_AT_ONCE: Final = 1000
_SEED: Final = 17
_QUIET_SECONDS: Final = 2.0


class RowSample(NamedTuple):
    """Rows in the order in which they were read, every row of the sources with the same chance."""

    rows: list[SnapshotRow]
    counts: dict[str, int]  # all rows of each source
    unreadable: int


class Proposed(NamedTuple):
    """The spec with the proposed settings, the suite, and what they were proposed from."""

    spec: RunSpec
    suite: dict[str, Any] | None
    proposals: list[Proposal]
    rows: int  # in the sample
    reasons: dict[str, int]
    examples: dict[str, list[str]]


def draw(sources: list[Source], formats: dict[str, str], data: DataSpec) -> RowSample:
    """Count every row of every file and keep 20,000 (reservoir sampling). Rows of builders are not there yet."""
    counts = {source.name: 0 for source in sources if source.kind != "builtin"}
    held: list[tuple[int, Source, RawRow]] = []
    chance, unreadable = random.Random(_SEED), 0
    for number, (source, row) in enumerate(_read(sources, data)):
        counts[source.name] += 1
        unreadable += isinstance(row.value, Rejection)
        if number < SAMPLE_ROWS:
            held.append((number, source, row))
        elif (place := chance.randrange(number + 1)) < SAMPLE_ROWS:
            held[place] = (number, source, row)
    converters = {name: row_converter(formats[name], data.columns, data.system_prompt) for name in counts}
    held.sort(key=lambda item: item[0])
    rows = [snapshot_row(source, row, converters[source.name]) for _, source, row in held]
    return RowSample(rows, counts, unreadable)


def _read(sources: list[Source], data: DataSpec) -> Iterator[tuple[Source, RawRow]]:
    done = 0
    with Display("reading rows", after=_QUIET_SECONDS) as display:
        for source in sources:
            for row in read_source(source, data) if source.kind != "builtin" else ():
                yield source, row
                done += 1
                if done % _AT_ONCE == 0:
                    display.show({"event": "progress", "what": "reading rows", "done": done})


def propose(sample: RowSample, spec: RunSpec, suite: Path) -> Proposed:
    """Limits for every setting that nobody has set, and a suite for the path `suite` unless another one is set."""
    if not sample.rows:
        return Proposed(spec, suite=None, proposals=[], rows=0, reasons={}, examples={})
    counts, languages = _languages(sample.rows, spec)
    changed = spec.rules.model_copy(update={"languages": languages})
    with tempfile.TemporaryDirectory() as root:
        folders = _checked(sample.rows, changed, spec.contract, Path(root))
        tally = Tally(folders)
        seen = _seen(sample, folders, languages, counts.total(), tally.reasons[Reason.WRONG_LANGUAGE])
    mine = {f"contract.{name}" for name in spec.contract.model_fields_set}
    mine |= {f"rules.{name}" for name in spec.rules.model_fields_set}
    settings = [setting for setting in proposed_settings(seen) if setting.name not in mine]
    values = {
        setting.name.partition(".")[2]: setting.value for setting in settings if setting.name.startswith("contract.")
    }
    rows_suite: dict[str, Any] | None = None
    limits: list[Proposal] = []
    if "suite" not in spec.contract.model_fields_set:
        rows_suite, limits = proposed_suite(load_suite(spec.contract.suite), seen, settings, f"{suite.stem}_rows")
        values["suite"] = str(suite)
    contract = spec.contract.model_copy(update=values)
    spec = spec.model_copy(update={"rules": changed, "contract": contract})
    return Proposed(
        spec, rows_suite, [*settings, *limits], len(sample.rows), dict(tally.reasons.most_common()), tally.examples
    )


def _languages(rows: list[SnapshotRow], spec: RunSpec) -> tuple[Counter[str], list[str]]:
    """How many answers are in which language, and the languages that are allowed: those set, else those that dominate."""
    read = [Row(conversation_from_json(row.messages), row.source, row.line) for row in rows if row.messages]
    answered = [row for row in read if row.messages and row.completion.strip()]
    found = [(row, name) for row in answered if (name := language(row.completion))]
    counts = Counter(name for _, name in found)
    if "languages" in spec.rules.model_fields_set:
        return counts, spec.rules.languages

    def outside(allowed: list[str]) -> int:
        rules = spec.rules.model_copy(update={"languages": allowed})
        others = (row for row, name in found if name not in allowed)
        return sum(
            in_an_allowed_language(case_of(row, rules, spec.contract.max_chars, own=None)) is not None for row in others
        )

    return counts, dominant_languages(counts, len(answered), outside)


def _checked(rows: list[SnapshotRow], rules: RulesSpec, contract: ContractSpec, root: Path) -> list[Path]:
    """The sample through repairs and row rules, a thousand rows at once; answers with their folders."""
    folders = []
    with Display("row rules", after=_QUIET_SECONDS) as display:
        for start in range(0, len(rows), _AT_ONCE):
            part, folder = root / f"{start}.parquet", root / str(start)
            folder.mkdir()
            pq.write_table(as_table(rows[start : start + _AT_ONCE]), part)
            check_part(Checks(rules, contract).of_part(part), folder)
            folders.append(folder)
            display.show({"event": "progress", "what": "row rules", "done": start, "of": len(rows)})
    return folders


def _seen(sample: RowSample, folders: list[Path], languages: list[str], known: int, others: int) -> Seen:
    numbers = kept_numbers(folders)
    kept = len(numbers)
    distinct = {name: numbers[name].nunique() / max(1, kept) for name in ("row_id", "answer_hash", "content_hash")}
    return Seen(
        total=sum(sample.counts.values()),
        rows=len(sample.rows),
        kept=kept,
        languages=languages,
        known_answers=known,
        in_others=others,
        lengths={name: numbers[name].to_numpy() for name in LENGTHS},
        profile=batch_profile(numbers),
        most_turns=int(numbers["turns"].max()) if kept else 0,
        distinct_rows=distinct["row_id"],
        distinct_answers=distinct["answer_hash"],
        duplicates=1 - distinct["content_hash"] if kept else 0.0,
    )
