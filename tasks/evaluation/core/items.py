"""What is known of a test item in addition to its scores: its cluster, its slices, its distractors."""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from tasks.data.curation.core.groups import Cluster, Key
from tasks.data.curation.core.shingles import words
from tasks.data.validation.core.languages import language

_SAME_ANSWER_WORDS = 4
_LENGTHS = ((64, "up to 64 tokens"), (256, "65 to 256 tokens"), (1024, "257 to 1,024 tokens"))


def cluster_keys(row_id: str, answer: str, cluster: str | None = None) -> list[Key]:
    """Keys of what items can share: an answer, but for case and white space, and a cluster of the user's own.

    A short answer, such as yes or a class, is no key. An item that shares nothing has its own row id as key.
    """
    found: list[Key] = [Cluster(cluster)] if cluster else []
    if len(words(answer)) >= _SAME_ANSWER_WORDS:
        found.append(hashlib.sha256(" ".join(answer.casefold().split()).encode()).hexdigest())
    return found or [row_id]


def item_slices(source: str, question: str, answer: str, tokens: int, field: str | None = None) -> dict[str, str]:
    """The slice of each kind that an item belongs to. tokens: of question and answer, as the model reads them; field: the
    value of the user's own (data.slice_field)."""
    spoken = language(answer) or language(question) or "unknown"
    length = next((name for most, name in _LENGTHS if tokens <= most), "over 1,024 tokens")
    return {"source": source, "language": spoken, "length": length, "field": field or "none"}


CHOICES = 4
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class TestQuestion:
    """A row of the test split, as distractors are chosen from it."""

    __test__ = False  # its name looks like a test class to pytest

    row_id: str
    source: str
    prompt: str
    answer: str


def choose_distractors(rows: list[TestQuestion], wanted: Collection[str]) -> dict[str, list[str]]:
    """For each row id in `wanted`, CHOICES answers: the true one at a place given by the row's hash, and its nearest
    neighbours among all rows.

    Nearest by TF-IDF cosine over the prompts, within the same source where it has enough rows. Rows for which fewer
    than CHOICES - 1 different answers exist are left out.
    """
    vectors = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit_transform(row.prompt for row in rows)
    transposed = vectors.T.tocsr()
    choices: dict[str, list[str]] = {}
    for index, row in enumerate(rows):
        if row.row_id not in wanted:
            continue
        others = _nearest(rows, index, (vectors[index] @ transposed).toarray()[0])
        if len(others) == CHOICES - 1:
            place = true_place(row.row_id)
            choices[row.row_id] = [*others[:place], row.answer, *others[place:]]
    return choices


def true_place(row_id: str) -> int:
    """Where the true answer stands, 0 to CHOICES - 1, by hash."""
    return hashlib.sha256(f"choice {row_id}".encode()).digest()[0] % CHOICES


def _nearest(rows: list[TestQuestion], index: int, similarity: NDArray[np.float64]) -> list[str]:
    row = rows[index]
    # Same source first, then nearest first; the row id breaks ties so that the order never depends on the input's.
    order = sorted(
        (i for i in range(len(rows)) if i != index),
        key=lambda i: (rows[i].source != row.source, -similarity[i], rows[i].row_id),
    )
    found: dict[str, str] = {row.answer.casefold(): row.answer}
    for i in order:
        found.setdefault(rows[i].answer.casefold(), rows[i].answer)
        if len(found) == CHOICES:
            break
    return list(found.values())[1:]


def word_overlap_guess(prompt: str, choices: list[str]) -> int:
    """The choice that shares the largest part of its words with the prompt: the baseline that knows no language."""
    asked = set(_WORD.findall(prompt.casefold()))
    shares = []
    for choice in choices:
        words = set(_WORD.findall(choice.casefold()))
        shares.append(len(words & asked) / len(words) if words else 0.0)
    return int(np.argmax(shares))
