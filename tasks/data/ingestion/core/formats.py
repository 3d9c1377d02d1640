"""Any supported row shape becomes one conversation, or a Rejection that says why not.

Shapes: alpaca, sharegpt, messages, prompt/completion, or the user's own column names.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from data_contracts.errors import DataError, Problem
from data_contracts.rows import Conversation, Message, Reason, Rejection, Role

Object = Mapping[str, Any]

# The fields that identify a format, in the order in which ties are broken.
_SIGNATURES: Final[dict[str, tuple[str, ...]]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
_ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


_SLICE_CHARS: Final = 80
_CLUSTER_DIGITS: Final = 32


class _Rejected(Exception):
    """Carries a Rejection out of nested readers."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.rejection = Rejection(reason, detail)


def detect_format(objects: Sequence[Object], where: str) -> str:
    """The format most of the first objects have. Raises DataError naming the fields found if none fits."""
    counts = {name: sum(all(f in o for f in fields) for o in objects) for name, fields in _SIGNATURES.items()}
    best = max(counts, key=lambda name: counts[name])
    if counts[best]:
        return best
    fields = list(dict.fromkeys(field for item in objects for field in item))
    first, second = fields[:2] if len(fields) > 1 else ("QUESTION", "ANSWER")
    raise DataError(
        Problem(
            f"the row format is not recognised; fields found: {', '.join(fields[:20]) or 'none'}",
            where,
            "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in _SIGNATURES.items()),
            f"name your columns, for example --set data.columns.prompt={first} "
            f"--set data.columns.completion={second}, or set data.format",
        )
    )


def check_columns(columns: Mapping[str, str]) -> Problem | None:
    """What is wrong with a column mapping: `prompt` and `completion` are needed, `system` is allowed."""
    missing = [name for name in ("prompt", "completion") if name not in columns]
    unknown = [name for name in columns if name not in ("prompt", "completion", "system")]
    if not missing and not unknown:
        return None
    found = "; ".join([f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown])
    return Problem(found, "data.columns", "prompt, completion, and optionally system", "--set data.columns.prompt=NAME")


def row_converter(format_name: str, columns: Mapping[str, str], system_prompt: str | None) -> "Converter":
    """A function from one JSON object to its conversation or Rejection. `format_name` "columns" uses the mapping."""
    reader = _READERS[format_name] if format_name != "columns" else lambda item: _from_columns(item, columns)

    def convert(item: Object) -> Conversation | Rejection:
        try:
            messages = reader(item)
        except _Rejected as rejected:
            return rejected.rejection
        messages = tuple(m for m in messages if m.content or m.role != "system")
        if system_prompt and all(message.role != "system" for message in messages):
            return (Message("system", system_prompt.strip()), *messages)
        return messages

    return convert


Converter = Callable[[Object], Conversation | Rejection]


def _text(value: Any, field: str) -> str:
    if value is None:
        raise _Rejected(Reason.MISSING_FIELD, f"{field} is missing or null")
    if not isinstance(value, str):
        raise _Rejected(Reason.WRONG_TYPE, f"{field} is {type(value).__name__}, not text")
    return value.strip()


def _optional(item: Object, field: str) -> str:
    return "" if item.get(field) is None else _text(item[field], field)


def _from_alpaca(item: Object) -> Conversation:
    """`system`, then the pairs of `history`, then instruction + blank line + input -> output."""
    instruction, extra = _text(item.get("instruction"), "instruction"), _optional(item, "input")
    history = item.get("history") or []
    if not isinstance(history, list):
        raise _Rejected(Reason.WRONG_TYPE, f"history is {type(history).__name__}, not a list")
    messages: list[Message] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Rejected(Reason.WRONG_TYPE, f"history.{index} is not a pair")
        messages.append(Message("user", _text(pair[0], f"history.{index}.0")))
        messages.append(Message("assistant", _text(pair[1], f"history.{index}.1")))
    prompt = "\n\n".join(part for part in (instruction, extra) if part)
    answer = Message("assistant", _text(item.get("output"), "output"))
    return (Message("system", _optional(item, "system")), *messages, Message("user", prompt), answer)


def _from_turns(item: Object, field: str) -> Conversation:
    """Turns as `{role, content}` or `{from, value}`, and an optional `system` text next to them."""
    turns = item.get(field)
    if turns is None:
        raise _Rejected(Reason.MISSING_FIELD, f"{field} is missing or null")
    if not isinstance(turns, list):
        raise _Rejected(Reason.WRONG_TYPE, f"{field} is {type(turns).__name__}, not a list")
    messages = [Message("system", _optional(item, "system"))]
    for index, turn in enumerate(turns):
        where = f"{field}.{index}"
        if not isinstance(turn, Mapping):
            raise _Rejected(Reason.WRONG_TYPE, f"{where} is {type(turn).__name__}, not an object")
        role = _text(turn.get("role", turn.get("from")), f"{where}.role")
        if role.lower() not in _ROLES:
            # 20 characters name any real role; a longer value may be somebody's text.
            raise _Rejected(Reason.UNKNOWN_ROLE, f"{where} is {role[:20]!r}")
        messages.append(
            Message(_ROLES[role.lower()], _text(turn.get("content", turn.get("value")), f"{where}.content"))
        )
    return tuple(messages)


def _from_prompt_completion(item: Object) -> Conversation:
    return _from_columns(item, {"prompt": "prompt", "completion": "completion", "system": "system"})


def _from_columns(item: Object, columns: Mapping[str, str]) -> Conversation:
    system = _at(item, columns["system"]) if "system" in columns else None
    return (
        Message("system", "" if system is None else _text(system, columns["system"])),
        Message("user", _text(_at(item, columns["prompt"]), columns["prompt"])),
        Message("assistant", _text(_at(item, columns["completion"]), columns["completion"])),
    )


def slice_of(item: Object, field: str | None) -> str | None:
    """The value of a field as the name of a slice; None where it has none or is no plain value."""
    value = None if field is None else _at(item, field)
    return str(value)[:_SLICE_CHARS] if isinstance(value, str | int | float) else None


def cluster_of(item: Object, field: str | None) -> str | None:
    """A hash of a field's value, as a name for the rows that share it; None where it has none or is no plain value."""
    value = None if field is None else _at(item, field)
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    return hashlib.sha256(text.encode()).hexdigest()[:_CLUSTER_DIGITS] if text else None


def _at(item: Object, path: str) -> Any:
    """The value at a dotted path (`instances.0.output`); a field whose own name holds the dots wins; None if absent."""
    if path in item:
        return item[path]
    value: Any = item
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


_READERS: Final[dict[str, Callable[[Object], Conversation]]] = {
    "alpaca": _from_alpaca,
    "sharegpt": lambda item: _from_turns(item, "conversations"),
    "messages": lambda item: _from_turns(item, "messages"),
    "prompt_completion": _from_prompt_completion,
}
