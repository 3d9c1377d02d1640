"""domain_choice items: the true answer among four, the others answer the nearest held-out questions.

Distractors come only from rows that no model trained on: a tuned model would otherwise prefer an answer it has seen.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

CHOICES = 4
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class TestRow:
    row_id: str
    source: str
    prompt: str
    answer: str


def choose_distractors(rows: list[TestRow], wanted: Collection[str]) -> dict[str, list[str]]:
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


def _nearest(rows: list[TestRow], index: int, similarity: NDArray[np.float64]) -> list[str]:
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
