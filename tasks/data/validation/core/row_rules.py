"""The row rules: the shape of the conversation, then every rule of the answer and of the text, each with its action.

A new rule is a function of a Case that answers with a detail or None; it is written and added to `RULES`.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from data_contracts.data_spec import CustomRule, RulesSpec
from data_contracts.rows import UNREADABLE, Reason, Rejection, Row, action_of
from tasks.data.validation.core import answer_rules, text_rules
from tasks.data.validation.core.text_rules import Case, OwnFunction

RowRule = Callable[[Case], str | None]


class RowCheck(NamedTuple):
    """Why the row goes to quarantine, if it does, and what was noticed on the way."""

    rejection: Rejection | None
    flags: tuple[Rejection, ...]


def _misshapen(row: Row) -> Rejection | None:
    """One optional system message, then user and assistant in turn, the assistant last, and no message empty."""
    if not row.messages or row.messages[-1].role != "assistant":
        last = f"the last message is the {row.messages[-1].role}'s" if row.messages else "no messages"
        return Rejection(Reason.NO_FINAL_ANSWER, last)
    start = 1 if row.messages[0].role == "system" else 0
    for index, message in enumerate(row.messages[start:]):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            return Rejection(Reason.WRONG_ROLE_ORDER, f"message {start + index + 1} is {message.role}, not {expected}")
    for index, message in enumerate(row.messages):
        if not message.content or message.content.isspace():
            reason = Reason.EMPTY_ANSWER if message.role == "assistant" else Reason.EMPTY_PROMPT
            return Rejection(reason, f"message {index + 1} ({message.role}) is empty")
    return None


def _not_too_long(case: Case) -> str | None:
    chars = sum(len(message.content) for message in case.messages)
    return f"{chars} characters, limit {case.max_chars}" if chars > case.max_chars else None


@lru_cache(maxsize=256)
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _broken_limit(rule: CustomRule, text: str) -> str | None:
    """The limit of a user's rule that the text breaks, without the text."""
    if rule.min_chars is not None and len(text) < rule.min_chars:
        return f"{len(text)} characters, at least {rule.min_chars}"
    if rule.max_chars is not None and len(text) > rule.max_chars:
        return f"{len(text)} characters, limit {rule.max_chars}"
    if rule.allowed is not None and text.strip() not in rule.allowed:
        return f"not one of {len(rule.allowed)} allowed values"
    if rule.forbidden is not None and _pattern(rule.forbidden).search(text):
        return "forbidden pattern found"
    if rule.required is not None and not _pattern(rule.required).search(text):
        return "required pattern missing"
    return None


def _keeps_the_users_rules(case: Case) -> str | None:
    for rule in case.rules.custom:
        if rule.field == "any":
            text = f"{case.prompt}\n{case.answer}"
        else:
            text = case.prompt if rule.field == "prompt" else case.answer
        if broken := _broken_limit(rule, text):
            return f"{rule.name}: {broken}"
    return None


def _passes_the_users_function(case: Case) -> str | None:
    """What the function says is the user's to word: it is cut, not checked. What it raises stops the run."""
    if case.own is None or (said := case.own(case.prompt, case.answer)) is None:
        return None
    name = (case.rules.function or "function").rpartition(":")[2]
    return f"{name}: {said[:80]}"


# The first that quarantines gives the row its reason: what breaks the text goes before what reads it.
RULES: tuple[tuple[Reason, RowRule], ...] = (
    (Reason.TEMPLATE_TOKEN, text_rules.no_template_tokens),
    (Reason.TOO_LONG, _not_too_long),
    (Reason.BROKEN_TEXT, text_rules.no_broken_text),
    (Reason.CONTROL_CHARACTERS, text_rules.no_control_characters),
    (Reason.ANSWER_EQUALS_PROMPT, answer_rules.differs_from_the_question),
    (Reason.PLACEHOLDER_ANSWER, answer_rules.is_no_placeholder),
    (Reason.PLACEHOLDER_FIELD, answer_rules.has_no_open_slots),
    (Reason.URL_ONLY, answer_rules.is_more_than_a_url),
    (Reason.MISSING_IMAGE, answer_rules.needs_no_image),
    (Reason.UNBALANCED_CODE_FENCE, answer_rules.closes_its_code),
    (Reason.BABBLE, answer_rules.does_not_loop),
    (Reason.REFUSAL, answer_rules.does_not_refuse),
    (Reason.TRUNCATED_ANSWER, answer_rules.comes_to_an_end),
    (Reason.PROMPT_LEAKS_ANSWER, answer_rules.adds_to_the_prompt),
    (Reason.MARKUP, text_rules.no_markup),
    (Reason.WRONG_LANGUAGE, text_rules.in_an_allowed_language),
    (Reason.MIXED_LANGUAGE, text_rules.in_one_language),
    (Reason.CUSTOM, _keeps_the_users_rules),
    (Reason.CUSTOM, _passes_the_users_function),
)


def check_row(
    row: Row,
    rules: RulesSpec,
    max_chars: int,
    overruled: frozenset[Reason] = frozenset(),
    *,
    own: OwnFunction | None = None,
) -> RowCheck:
    """The first reason to quarantine the row, and the flags found before it.

    `max_chars` counts all messages together. `overruled`: reasons from which a person has released this row; an
    unreadable row cannot be released. `own` is the loaded `rules.function`.
    """
    if misshapen := _misshapen(row):
        return RowCheck(misshapen, ())
    case = text_rules.case_of(row, rules, max_chars, own)
    flags: list[Rejection] = []
    for reason, rule in RULES:
        action = action_of(reason, rules.actions)
        if action == "off" or (reason in overruled and reason not in UNREADABLE):
            continue
        if (detail := rule(case)) is None:
            continue
        if action == "quarantine":
            return RowCheck(Rejection(reason, detail), tuple(flags))
        flags.append(Rejection(reason, detail))
    return RowCheck(rejection=None, flags=tuple(flags))
