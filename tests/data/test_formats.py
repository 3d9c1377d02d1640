"""Every supported shape becomes the same conversation; what does not fit is rejected with its reason."""

from typing import Any

import pytest

from data_contracts.errors import DataError
from data_contracts.rows import Message, Reason, Rejection
from tasks.data.ingestion.core.formats import Conversation, check_columns, detect_format, row_converter

HELLO = (Message("user", "hi"), Message("assistant", "hello"))
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "alpaca": ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}),
    "alpaca without input": ("alpaca", {"instruction": " hi ", "output": "hello\n"}),
    "alpaca with null input": ("alpaca", {"instruction": "hi", "input": None, "output": "hello"}),
    "sharegpt": ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}),
    "messages": (
        "messages",
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    ),
    "conversations with role and content": (
        "sharegpt",
        {"conversations": [{"role": "User", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    ),
    "prompt_completion": ("prompt_completion", {"prompt": "hi", "completion": "hello", "id": 7}),
}


def convert(name: str, item: dict[str, Any], system_prompt: str | None = None) -> Conversation | Rejection:
    return row_converter(name, {}, system_prompt)(item)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_detected_and_becomes_the_canonical_conversation(name: str) -> None:
    expected, item = SHAPES[name]
    assert detect_format([item], "a.jsonl") == expected
    assert convert(expected, item) == HELLO


def test_alpaca_joins_instruction_and_input_and_puts_system_and_history_first() -> None:
    item = {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert [tuple(message) for message in convert("alpaca", item)] == [  # type: ignore[union-attr]
        ("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q\n\nx"), ("assistant", "a"),
    ]  # fmt: skip


def test_the_system_prompt_goes_only_to_rows_without_one() -> None:
    own = {"messages": [{"role": "system", "content": "mine"}, *SHAPES["messages"][1]["messages"]]}
    assert convert("messages", own, "default") == (Message("system", "mine"), *HELLO)
    assert convert("messages", SHAPES["messages"][1], "default") == (Message("system", "default"), *HELLO)


def test_dotted_columns_reach_into_nested_values_and_missing_steps_are_missing_fields() -> None:
    columns = {"prompt": "ask", "completion": "instances.0.output", "system": "meta.role"}
    read = row_converter("columns", columns, None)
    full = {"ask": "hi", "instances": [{"output": "hello"}], "meta": {"role": "s"}}
    assert read(full) == (Message("system", "s"), *HELLO)
    assert read({"ask": "hi", "instances": [{"output": "hello"}]}) == HELLO
    assert read({"ask": "hi", "instances": []}) == Rejection(
        Reason.MISSING_FIELD, "instances.0.output is missing or null"
    )
    assert row_converter("columns", {"prompt": "a.b", "completion": "c"}, None)({"a.b": "hi", "c": "hello"}) == HELLO


REJECTED: dict[str, tuple[Reason, str, dict[str, Any]]] = {
    "no output": (Reason.MISSING_FIELD, "alpaca", {"instruction": "hi"}),
    "null answer": (Reason.MISSING_FIELD, "prompt_completion", {"prompt": "hi", "completion": None}),
    "no turns": (Reason.MISSING_FIELD, "messages", {"text": "hi"}),
    "turn without content": (Reason.MISSING_FIELD, "messages", {"messages": [{"role": "user"}]}),
    "number as answer": (Reason.WRONG_TYPE, "prompt_completion", {"prompt": "hi", "completion": 5}),
    "list as content": (Reason.WRONG_TYPE, "messages", {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}),
    "turns as text": (Reason.WRONG_TYPE, "sharegpt", {"conversations": "hi"}),
    "turn as text": (Reason.WRONG_TYPE, "sharegpt", {"conversations": ["hi"]}),
    "history without pairs": (Reason.WRONG_TYPE, "alpaca", {"instruction": "a", "output": "b", "history": ["x"]}),
    "tool call": (Reason.UNKNOWN_ROLE, "sharegpt", {"conversations": [{"from": "function_call", "value": "{}"}]}),
    "tool result": (Reason.UNKNOWN_ROLE, "messages", {"messages": [{"role": "tool", "content": "{}"}]}),
    "observation": (Reason.UNKNOWN_ROLE, "sharegpt", {"conversations": [{"from": "observation", "value": "1"}]}),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_row_that_does_not_fit_is_rejected_with_its_reason(name: str) -> None:
    reason, format_name, item = REJECTED[name]
    answer = convert(format_name, item)
    assert isinstance(answer, Rejection)
    assert answer.reason == reason


def test_the_format_of_most_rows_wins() -> None:
    rows = [SHAPES["sharegpt"][1], SHAPES["alpaca"][1], SHAPES["alpaca"][1]]
    assert detect_format(rows, "a.jsonl") == "alpaca"


def test_an_unknown_shape_names_the_file_the_fields_and_the_next_act() -> None:
    with pytest.raises(DataError) as caught:
        detect_format([{"question": "hi", "answer": "hello"}], "faq.jsonl")
    text = str(caught.value)
    for part in ("faq.jsonl", "question, answer", "--set data.columns.prompt=question", "data.format"):
        assert part in text


def test_a_column_mapping_needs_prompt_and_completion_and_nothing_unknown() -> None:
    assert check_columns({"prompt": "q", "completion": "a", "system": "s"}) is None
    assert "promt is unknown" in str(check_columns({"promt": "q", "completion": "a"}))
