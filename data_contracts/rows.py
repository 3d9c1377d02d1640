"""The canonical row: a conversation, and where it came from.

Example: Row(messages=[Message("user", "hi"), Message("assistant", "hello")], source="a.jsonl", line=3)
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: messages end with the assistant's answer once the row has passed the rules."""

    messages: tuple[Message, ...]
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


def content_id(messages: tuple[Message, ...]) -> str:
    """Hex sha256 of the messages as compact JSON."""
    return hashlib.sha256(as_json(messages).encode()).hexdigest()


def as_json(messages: tuple[Message, ...]) -> str:
    """Compact ASCII JSON: pairs of role and text."""
    return json.dumps(messages, ensure_ascii=True, separators=(",", ":"))


def from_json(text: str) -> tuple[Message, ...]:
    """The messages that `as_json` wrote."""
    return tuple(Message(role, content) for role, content in json.loads(text))
