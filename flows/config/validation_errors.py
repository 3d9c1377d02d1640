"""Say in plain words what pydantic found wrong with a spec: the key, the value, the limit, the next act."""

import difflib
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from data_contracts.errors import Problem
from data_contracts.run_spec import RunSpec

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text, in quotes if it looks like a number",
    "list_type": "a list, such as [a, b]",
    "dict_type": "a mapping, such as {prompt: question, completion: answer}",
    "none_required": "null",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


@cache
def all_settings() -> dict[str, FieldInfo]:
    """Every key a spec has, dotted, in the order of the stages."""
    return {
        f"{section}.{name}": setting
        for section, field in RunSpec.model_fields.items()
        for name, setting in cast(type[BaseModel], field.annotation).model_fields.items()
    }


def unknown_key(key: str, where: str) -> Problem:
    return Problem(f"unknown key {key!r}", where, act=_closest(key))


def _closest(key: str) -> str:
    """What the writer of an unknown key most likely meant."""
    section, _, field = key.partition(".")
    if key in RunSpec.model_fields:
        return f"{key} is a section; set one of {', '.join(_fields_of(key).values())}"
    if field and section in RunSpec.model_fields:
        near = difflib.get_close_matches(field, _fields_of(section), n=1)
        return f"did you mean {_fields_of(section)[near[0]]}?" if near else _elsewhere(section, field)
    near = difflib.get_close_matches(key, [*all_settings(), *RunSpec.model_fields], n=1, cutoff=0.75)
    return f"did you mean {near[0]}?" if near else _elsewhere("", field or key)


def _elsewhere(section: str, field: str) -> str:
    """Look for a setting of that name in any section; else list what there is."""
    names = sorted({name.partition(".")[2] for name in all_settings()})
    near = difflib.get_close_matches(field, names, n=1, cutoff=0.7)
    if near:
        return f"did you mean {' or '.join(name for name in all_settings() if name.partition('.')[2] == near[0])}?"
    if section:
        return f"its keys are {', '.join(_fields_of(section).values())}"
    return f"the sections are {', '.join(RunSpec.model_fields)}"


def _fields_of(section: str) -> dict[str, str]:
    """Field name to dotted key, for one section."""
    return {name.partition(".")[2]: name for name in all_settings() if name.startswith(f"{section}.")}


def spec_problems(
    error: ValidationError, given: dict[str, dict[str, Any]], origins: dict[str, str]
) -> Iterator[Problem]:
    """One problem for each wrong key; the branches of a union are one problem."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(".".join(str(part) for part in detail["loc"][:2]), []).append(detail)
    for key, details in by_key.items():
        section, _, field = key.partition(".")
        if not field:
            yield from _section_problems(section, details[0], origins)
            continue
        needs = " or ".join(dict.fromkeys(_needs(detail) for detail in details))
        value = details[0]["input"] if len(details) == 1 else given[section][field]
        yield Problem(f"{key} is {_shown(value)}", origins[key], needs, _act(section, field, details[0]))


def _needs(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        return f"{words} {context[name]}"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    if kind == "too_short":
        return f"at least {context['min_length']} item"
    if kind in ("string_too_long", "string_too_short"):
        return f"{context.get('max_length', context.get('min_length'))} character"
    return _KINDS.get(kind) or detail["msg"].removeprefix("Value error, ")


def _section_problems(section: str, detail: ErrorDetails, origins: dict[str, str]) -> Iterator[Problem]:
    """Rules that bind several settings, of one section or (no section) of several: a problem for each line of reasons, at the
    settings that it names."""
    turned = {key: o for key, o in origins.items() if key.startswith(section) and o != "default"}
    for reason in _needs(detail).splitlines():
        named = {key: o for key, o in turned.items() if re.search(rf"\b{key.partition('.')[2]}\b", reason)} or turned
        where = ", ".join(f"{key} ({origin})" for key, origin in named.items())
        yield Problem(f"the {section or 'spec'}'s settings do not fit together", where, reason, "change one of them")


def _act(section: str, field: str, detail: ErrorDetails) -> str:
    value = detail["input"]
    if detail["type"] == "literal_error":
        names = re.findall(r"'([^']+)'", detail.get("ctx", {})["expected"])
        near = difflib.get_close_matches(str(value), names, n=1)
        if near:
            return f"did you mean {near[0]}?"
    default = getattr(getattr(RunSpec(), section), field)
    return f"the default is {section}.{field}={_shown(default)}"


def _shown(value: Any) -> str:
    """A value as a person types it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and math.isnan(value):
        return ".nan"
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:117]}..." if len(text) > 120 else text or "empty"
