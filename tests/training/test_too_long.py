"""Rows longer than the model may see: `pytest tests/training/test_too_long.py`."""

import pytest

from tasks.models.core.packing import ScoredSequence
from tasks.training.workers.training_rows import fit


def row(prompt: int, answer: int) -> ScoredSequence:
    """Prompt tokens count up from 0, answer tokens from 1,000; the last is the stop token."""
    return ScoredSequence([*range(prompt), *range(1000, 1000 + answer)], prompt)


def scored_tokens(sequences: list[ScoredSequence]) -> list[int]:
    return [token for sequence in sequences for token in sequence.ids[sequence.start :]]


@pytest.mark.parametrize("policy", ["leave_out", "truncate", "split"])
def test_a_row_that_fits_stays_as_it_is(policy):
    assert fit(row(10, 10), 20, policy) == [row(10, 10)]


def test_a_row_that_is_left_out_leaves_nothing():
    assert fit(row(10, 11), 20, "leave_out") == []


def test_a_long_prompt_loses_its_middle_and_the_answer_stays_whole():
    (found,) = fit(row(100, 5), 25, "truncate")
    assert found == ScoredSequence([*range(10), *range(90, 100), *range(1000, 1005)], 20)


def test_a_long_answer_loses_its_end_and_its_stop_token():
    (found,) = fit(row(4, 100), 20, "truncate")
    assert found == ScoredSequence([*range(4), *range(1000, 1016)], 4)


def test_a_long_prompt_and_a_long_answer_share_the_limit():
    (found,) = fit(row(100, 100), 20, "truncate")
    assert found == ScoredSequence([*range(5), *range(95, 100), *range(1000, 1010)], 10)


@pytest.mark.parametrize("prompt", [1, 7, 50])
@pytest.mark.parametrize("answer", [1, 9, 40, 333])
@pytest.mark.parametrize("limit", [16, 33])
def test_split_scores_every_answer_token_once_within_the_limit(prompt, answer, limit):
    sequences = fit(row(prompt, answer), limit, "split")
    assert scored_tokens(sequences) == list(range(1000, 1000 + answer))
    assert all(len(s.ids) <= limit and 1 <= s.start < len(s.ids) for s in sequences)


def test_a_later_piece_sees_the_prompt_and_the_answer_before_it():
    _, second, *_ = fit(row(4, 60), 24, "split")
    assert list(second.ids[:4]) == [0, 1, 2, 3]
    assert list(second.ids[4 : second.start]) == list(range(1010, 1020))
    assert second.ids[second.start] == 1020
