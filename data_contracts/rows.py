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
    UNPARSABLE = "unparsable"
    """Not JSON, or a CSV record whose cells do not fit the header."""
    UNDECODABLE = "undecodable"
    """Bytes that are not in the source's encoding, or a lone surrogate."""
    DUPLICATE_KEY = "duplicate_key"
    """A JSON object that names one field twice."""
    NOT_AN_OBJECT = "not_an_object"
    """JSON, but a list, a number or a string."""
    MISSING_FIELD = "missing_field"
    """The record has not the fields of its format."""
    WRONG_TYPE = "wrong_type"
    """A field has another type than its format needs."""
    UNKNOWN_ROLE = "unknown_role"
    """A message of another role than system, user and assistant: a tool's, for example."""
    # found by the row rules: the shape of the conversation
    NO_FINAL_ANSWER = "no_final_answer"
    """The last message is not the assistant's."""
    WRONG_ROLE_ORDER = "wrong_role_order"
    """After an optional system message, user and assistant do not take turns."""
    EMPTY_PROMPT = "empty_prompt"
    """A message of the system or the user is empty."""
    EMPTY_ANSWER = "empty_answer"
    """A message of the assistant is empty."""
    TEMPLATE_TOKEN = "template_token"
    """The text contains a token of a chat template, such as <|im_start|>."""
    TOO_LONG = "too_long"
    """More characters than `contract.max_chars`."""
    # the answer
    ANSWER_EQUALS_PROMPT = "answer_equals_prompt"
    """The answer is the question again."""
    PROMPT_LEAKS_ANSWER = "prompt_leaks_answer"
    """The prompt already contains the answer."""
    PLACEHOLDER_ANSWER = "placeholder_answer"
    """A placeholder stands in for the answer: N/A, TODO, three dots."""
    PLACEHOLDER_FIELD = "placeholder_field"
    """A template's {{name}} was never filled in."""
    REFUSAL = "refusal"
    """The answer refuses the task."""
    TRUNCATED_ANSWER = "truncated_answer"
    """The answer ends in the middle of a sentence."""
    UNBALANCED_CODE_FENCE = "unbalanced_code_fence"
    """A code block is opened and never closed."""
    BABBLE = "babble"
    """The same words are repeated again and again."""
    URL_ONLY = "url_only"
    """The answer is nothing but an address."""
    MISSING_IMAGE = "missing_image"
    """The row speaks of an image, which it cannot hold."""
    # the text
    MARKUP = "markup"
    """HTML tags or entities are left in the answer."""
    BROKEN_TEXT = "broken_text"
    """Replacement characters, or mojibake that cannot be repaired."""
    CONTROL_CHARACTERS = "control_characters"
    """Control characters, or overrides of the text's direction, that repair leaves."""
    WRONG_LANGUAGE = "wrong_language"
    """The answer is in none of `rules.languages`."""
    MIXED_LANGUAGE = "mixed_language"
    """A passage of the answer is in a script that `rules.languages` do not use."""
    PERSONAL_DATA = "personal_data"
    """Personal data were found, and `rules.personal_data` is quarantine."""
    SECRET = "secret"
    """A key, token or password was found, and `rules.secrets` is quarantine."""
    CUSTOM = "custom"
    """A rule of your own rejects the row; the detail names it."""
    # found by comparing rows
    CONTRADICTION = "contradiction"
    """Another row answers the same prompt differently."""
    NEAR_TEST_ITEM = "near_test_item"
    """A near copy of a held-out row."""
    BRIDGES_SPLITS = "bridges_splits"
    """The row ties rows of two splits together."""
    CONTAMINATED = "contaminated"
    """The row contains most of a held-out or benchmark item."""


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
