"""What is known of a test item besides its scores: which items say the same, and its slices."""

import hashlib

from tasks.data.curation.core.groups import cluster_key
from tasks.data.curation.core.shingles import words
from tasks.data.validation.core.languages import language

_SAME_ANSWER_WORDS = 4
_LENGTHS = ((64, "up to 64 tokens"), (256, "65 to 256 tokens"), (1024, "257 to 1,024 tokens"))


def shared(row_id: str, answer: str, cluster: str | None = None) -> list[str]:
    """What an item's score depends on beside itself: its answer, but for case and white space, and its cluster.

    A shorter answer, such as yes or a class, says nothing of the kind. An item that shares nothing has its own name.
    """
    found = [cluster_key(cluster)] if cluster else []
    if len(words(answer)) >= _SAME_ANSWER_WORDS:
        found.append(hashlib.sha256(" ".join(answer.casefold().split()).encode()).hexdigest())
    return found or [row_id]


def slices(source: str, question: str, answer: str, tokens: int, field: str | None = None) -> dict[str, str]:
    """The slice of each kind that an item belongs to. tokens: of question and answer, as the model reads them; field: the
    value of the user's own (data.slice_field)."""
    spoken = language(answer) or language(question) or "unknown"
    length = next((name for most, name in _LENGTHS if tokens <= most), "over 1,024 tokens")
    return {"source": source, "language": spoken, "length": length, "field": field or "none"}
