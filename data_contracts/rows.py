"""The canonical row: a conversation, and where it came from.

Example: Row(messages=[Message("user", "hi"), Message("assistant", "hello")], source="a.jsonl", line=3)
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, NamedTuple

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    role: Role
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: messages end with the assistant's answer once the row has passed the rules."""

    messages: Conversation
    source: str  # file name or builder, without the path of this machine
    line: int  # 1-based line, or record number where the format has no lines

    @property
    def prompt(self) -> str:
        """All but the last message, as plain text."""
        return "\n".join(message.content for message in self.messages[:-1])

    @property
    def completion(self) -> str:
        """The last message: what the model learns to write."""
        return self.messages[-1].content

    @property
    def row_id(self) -> str:
        """sha256 of the conversation alone: the same text has the same id wherever it stands."""
        return content_id(self.messages)


class SnapshotRow(NamedTuple):
    """One record as the snapshot keeps it, readable or not: the columns of its Parquet files, in their order."""

    row_id: str
    source: str
    line: int
    raw: str
    messages: str | None  # of `conversation_as_json`; None if the record was rejected
    reason: str | None
    detail: str | None
    slice: str | None  # the value of data.slice_field
    cluster: str | None  # a hash of the value of data.cluster_field


def content_id(messages: Conversation) -> str:
    """Hex sha256 of the messages as compact JSON."""
    return hashlib.sha256(conversation_as_json(messages).encode()).hexdigest()


def conversation_as_json(messages: Conversation) -> str:
    """Compact ASCII JSON: pairs of role and text."""
    return json.dumps(messages, ensure_ascii=True, separators=(",", ":"))


def conversation_from_json(text: str) -> Conversation:
    """The messages that `conversation_as_json` wrote."""
    return tuple(Message(role, content) for role, content in json.loads(text))


Action = Literal["quarantine", "flag", "off"]


class Reason(StrEnum):
    """Every reason a row can be rejected for; the values stand in quarantine files and reports."""

    # found while the row is read: nothing but a repaired source brings these back
    UNPARSABLE = "unparsable"  # not JSON, or a CSV record whose cells do not fit the header
    UNDECODABLE = "undecodable"  # bytes that are not in the source's encoding, or a lone surrogate
    DUPLICATE_KEY = "duplicate_key"  # a JSON object that names one field twice
    NOT_AN_OBJECT = "not_an_object"  # JSON, but a list, a number, a string
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    UNKNOWN_ROLE = "unknown_role"  # tool turns, for example
    # found by the row rules: the shape of the conversation
    NO_FINAL_ANSWER = "no_final_answer"
    WRONG_ROLE_ORDER = "wrong_role_order"
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_ANSWER = "empty_answer"
    TEMPLATE_TOKEN = "template_token"
    TOO_LONG = "too_long"
    # the answer
    ANSWER_EQUALS_PROMPT = "answer_equals_prompt"
    PROMPT_LEAKS_ANSWER = "prompt_leaks_answer"
    PLACEHOLDER_ANSWER = "placeholder_answer"
    PLACEHOLDER_FIELD = "placeholder_field"  # a template's {{name}} that was never filled in
    REFUSAL = "refusal"
    TRUNCATED_ANSWER = "truncated_answer"
    UNBALANCED_CODE_FENCE = "unbalanced_code_fence"
    BABBLE = "babble"  # the same words again and again
    URL_ONLY = "url_only"
    MISSING_IMAGE = "missing_image"
    # the text
    MARKUP = "markup"
    BROKEN_TEXT = "broken_text"  # replacement characters, or mojibake that cannot be repaired
    CONTROL_CHARACTERS = "control_characters"
    WRONG_LANGUAGE = "wrong_language"
    MIXED_LANGUAGE = "mixed_language"
    PERSONAL_DATA = "personal_data"
    SECRET = "secret"
    CUSTOM = "custom"  # a rule of the user's own; the detail names it
    # found by comparing rows
    CONTRADICTION = "contradiction"  # another row answers the same prompt differently
    NEAR_TEST_ITEM = "near_test_item"  # a near copy of a held-out row
    BRIDGES_SPLITS = "bridges_splits"  # near rows of two splits
    CONTAMINATED = "contaminated"  # shares most of a held-out or benchmark item


# A repaired source brings these rows back, an overruled reason cannot: there is no conversation, or it would leak.
UNREADABLE: Final = frozenset(
    {
        Reason.UNPARSABLE, Reason.UNDECODABLE, Reason.DUPLICATE_KEY, Reason.NOT_AN_OBJECT, Reason.MISSING_FIELD,
        Reason.WRONG_TYPE, Reason.UNKNOWN_ROLE, Reason.NO_FINAL_ANSWER, Reason.WRONG_ROLE_ORDER, Reason.EMPTY_PROMPT,
        Reason.EMPTY_ANSWER, Reason.TEMPLATE_TOKEN,
    }
)  # fmt: skip
LEAKS: Final = frozenset({Reason.NEAR_TEST_ITEM, Reason.BRIDGES_SPLITS, Reason.CONTAMINATED})
# Signs that are right too often to quarantine for unasked: measured on real sets, see docs/data.md.
FLAGGED: Final = frozenset(
    {
        Reason.REFUSAL, Reason.PROMPT_LEAKS_ANSWER, Reason.MARKUP, Reason.MIXED_LANGUAGE, Reason.CONTRADICTION,
        Reason.TRUNCATED_ANSWER,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rejection:
    """A reason, and a detail that names fields, lengths and limits but never quotes the row."""

    reason: Reason
    detail: str = ""


def action_of(reason: Reason, actions: Mapping[Reason, Action]) -> Action:
    """What is done about a reason: as configured, else its default."""
    return actions.get(reason, "flag" if reason in FLAGGED else "quarantine")
