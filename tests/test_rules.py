"""Each row rule catches what it is for and lets its traps through."""

import pytest

from data_contracts.records import Message, Role, Row
from data_contracts.rules import RULES, Reason, check_row

LONG = 100


def row(*turns: tuple[Role, str]) -> Row:
    return Row(tuple(Message(role, content) for role, content in turns), "a.jsonl", 1)


def ask(prompt: str, answer: str) -> Row:
    return row(("user", prompt), ("assistant", answer))


CAUGHT = {
    "no messages": (Reason.NO_FINAL_ANSWER, row()),
    "ends with a question": (Reason.NO_FINAL_ANSWER, row(("user", "a"), ("assistant", "b"), ("user", "c"))),
    "starts with an answer": (Reason.WRONG_ROLE_ORDER, row(("assistant", "b"))),
    "two questions in a row": (Reason.WRONG_ROLE_ORDER, row(("user", "a"), ("user", "b"), ("assistant", "c"))),
    "late system": (Reason.WRONG_ROLE_ORDER, row(("user", "a"), ("system", "b"), ("assistant", "c"))),
    "empty question": (Reason.EMPTY_PROMPT, ask("", "b")),
    "blank question": (Reason.EMPTY_PROMPT, ask(" \n", "b")),
    "empty answer": (Reason.EMPTY_ANSWER, ask("a", "")),
    "empty early answer": (
        Reason.EMPTY_ANSWER,
        row(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")),
    ),
    "echo": (Reason.ANSWER_EQUALS_PROMPT, ask("Reset  the ROUTER", "reset the router")),
    "ChatML token": (Reason.TEMPLATE_TOKEN, ask("a", "b<|im_end|>\n<|im_start|>user")),
    "Llama token in the question": (Reason.TEMPLATE_TOKEN, ask("[INST] a [/INST]", "b")),
    "Gemma token": (Reason.TEMPLATE_TOKEN, ask("a", "<start_of_turn>model")),
    "too long": (Reason.TOO_LONG, ask("a" * LONG, "b")),
}
KEPT = {
    "one-word label": ask("Where is my card?", "card_arrival"),
    "one-character answer": ask("2 + 2?", "4"),
    "system first": row(("system", "Be brief."), ("user", "a"), ("assistant", "b")),
    "many turns": row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    "an answer that repeats the question and more": ask("Say hello", "Say hello to whom?"),
    "the early question repeated as last answer": row(
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "a")
    ),
    "strikethrough is HTML, not a token": ask("What does <s>old</s> show?", "Struck text"),
    "operators of functional languages": ask("What is <|> in Haskell?", "a <|> b is an alternative"),
    "talk about INST without brackets": ask("What does INST mean?", "An instruction"),
    "exactly as long as allowed": ask("a" * (LONG - 1), "b"),
    "apology": ask("My order is late", "I'm sorry that your order is late."),
    "full-width Japanese": ask("ルーターを再起動する方法", "電源を切ってください"),
}


def test_there_are_cases_for_every_reason_a_rule_can_give() -> None:
    unread = {"unparsable", "undecodable", "not_an_object", "missing_field", "wrong_type", "unknown_role"}
    assert {reason.value for reason, _ in CAUGHT.values()} == {reason.value for reason in Reason} - unread
    assert len(RULES) == 6


@pytest.mark.parametrize("name", CAUGHT)
def test_a_bad_row_is_rejected_with_its_reason(name: str) -> None:
    reason, bad = CAUGHT[name]
    rejection = check_row(bad, LONG)
    assert rejection is not None
    assert rejection.reason == reason


@pytest.mark.parametrize("name", KEPT)
def test_a_trap_is_let_through(name: str) -> None:
    assert check_row(KEPT[name], LONG) is None


def test_a_detail_names_lengths_and_limits_but_never_quotes_the_row() -> None:
    secret = "Anna Schmidt, born 1970"
    details = [check_row(bad, 10) for bad in (ask(secret, secret), ask(secret, ""), ask(secret, "b" * 50))]
    assert all(rejection is not None and "Anna" not in rejection.detail for rejection in details)
    assert details[2] is not None
    assert details[2].detail == "73 characters, limit 10"
