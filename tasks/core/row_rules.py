"""The row rules: each answers with a Rejection or None, and a new one is written and added to `RULES`."""

import re
from collections.abc import Callable

from data_contracts.records import Row
from data_contracts.rules import Reason, Rejection

Rule = Callable[[Row, int], Rejection | None]

# Tokens that steer a chat template. Written into a row, they end the turn and open another one. Plain `<s>` and
# `</s>` are left alone: they are also HTML.
_TEMPLATE_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|end_of_text|begin_of_text|eot_id|eom_id|start_header_id|end_header_id"
    r"|system|user|assistant|end)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)


def _ends_with_an_answer(row: Row, max_chars: int) -> Rejection | None:
    if row.messages and row.messages[-1].role == "assistant":
        return None
    last = f"the last message is the {row.messages[-1].role}'s" if row.messages else "no messages"
    return Rejection(Reason.NO_FINAL_ANSWER, last)


def _roles_alternate(row: Row, max_chars: int) -> Rejection | None:
    """One optional system message, then user and assistant in turn."""
    start = 1 if row.messages[0].role == "system" else 0
    for index, message in enumerate(row.messages[start:]):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            return Rejection(Reason.WRONG_ROLE_ORDER, f"message {start + index + 1} is {message.role}, not {expected}")
    return None


def _nothing_is_empty(row: Row, max_chars: int) -> Rejection | None:
    for index, message in enumerate(row.messages):
        if not message.content.strip():
            reason = Reason.EMPTY_ANSWER if message.role == "assistant" else Reason.EMPTY_PROMPT
            return Rejection(reason, f"message {index + 1} ({message.role}) is empty")
    return None


def _answer_differs_from_question(row: Row, max_chars: int) -> Rejection | None:
    question, answer = row.messages[-2].content, row.messages[-1].content
    if " ".join(question.casefold().split()) == " ".join(answer.casefold().split()):
        return Rejection(Reason.ANSWER_EQUALS_PROMPT, f"{len(answer)} characters")
    return None


def _no_template_tokens(row: Row, max_chars: int) -> Rejection | None:
    for index, message in enumerate(row.messages):
        if found := _TEMPLATE_TOKEN.search(message.content):
            return Rejection(Reason.TEMPLATE_TOKEN, f"{found[0]} in message {index + 1} ({message.role})")
    return None


def _not_too_long(row: Row, max_chars: int) -> Rejection | None:
    chars = sum(len(message.content) for message in row.messages)
    return Rejection(Reason.TOO_LONG, f"{chars} characters, limit {max_chars}") if chars > max_chars else None


# In this order: later rules rely on the shape that earlier ones have checked.
RULES: tuple[Rule, ...] = (
    _ends_with_an_answer,
    _roles_alternate,
    _nothing_is_empty,
    _answer_differs_from_question,
    _no_template_tokens,
    _not_too_long,
)


def check_row(row: Row, max_chars: int) -> Rejection | None:
    """The first rule that rejects the row, or None if it keeps every promise. `max_chars`: all messages together."""
    for rule in RULES:
        if rejection := rule(row, max_chars):
            return rejection
    return None
