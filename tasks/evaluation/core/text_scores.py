"""How near a written answer comes to the true one, and how much it repeats itself. Each score is between 0 and 1.

Words are those of tasks.data.curation.core.shingles: they are found in every script, and signs count as words.
"""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

from tasks.data.curation.core.shingles import words

_REPEATED_WORDS = 4


class _Words:
    """rouge_score's own tokenizer drops every letter beyond ASCII, and with it a Chinese answer as a whole."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(reference: str, written: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, aclanthology.org/W04-1013); 0 without words."""
    return float(_ROUGE.score(reference, written)["rougeL"].fmeasure)


def exact_match(reference: str, written: str) -> float:
    """1 if the texts are the same but for white space, else 0."""
    return float(reference.split() == written.split())


def repetition(written: str) -> float:
    """Share of the runs of four words that were there before: 1 - different / all (seq-rep-4, arXiv 1908.04319)."""
    found = words(written)
    runs: Sequence[tuple[str, ...]] = list(zip(*(found[start:] for start in range(_REPEATED_WORDS)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
