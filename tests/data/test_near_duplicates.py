"""Near copies: one stays, nothing near a held-out row trains, and anchors keep their place."""

import numpy as np
import pytest

from tasks.data.curation.core.near_duplicates import (
    ComparedRows,
    CopyState,
    badness,
    resolve_exact,
    resolve_near,
)
from tasks.data.curation.core.split import Known

KEPT, DUPLICATE, NEAR_TEST, BRIDGES, ABSENT = CopyState
TRAIN, TEST = Known("train", True), Known("test", True)
COPY_OF_TEST, COPY_OF_TRAIN = Known("test", False), Known("train", False)


def rows(*known, absent=(), worse=None) -> ComparedRows:
    places = np.arange(len(known))
    worse = np.zeros(len(known), np.int64) if worse is None else np.asarray(worse)
    return ComparedRows([f"id{i}" for i in range(len(known))], list(known), np.isin(places, absent), worse)


def near(*known, pairs, absent=(), worse=None):
    found = resolve_near(np.array(pairs, np.int64).reshape(-1, 2), rows(*known, absent=absent, worse=worse))
    return found.states.tolist(), found.originals.tolist()


def test_of_new_near_copies_the_smallest_id_stays():
    assert near(None, None, None, pairs=[(2, 1)]) == ([KEPT, KEPT, DUPLICATE], [0, 1, 1])


def test_of_new_near_copies_the_best_stays_whatever_its_id():
    assert near(None, None, None, pairs=[(0, 1), (1, 2)], worse=[5, 4, 3])[1] == [2, 2, 2]
    assert resolve_exact(np.array([7, 7]), rows(None, None, worse=[1, 0]))[0].originals.tolist() == [1, 1]


def test_a_row_that_was_kept_before_stays_though_a_better_copy_comes():
    assert near(TRAIN, None, pairs=[(0, 1)], worse=[9, 0]) == ([KEPT, DUPLICATE], [0, 0])


def test_flags_weigh_more_than_repairs_and_repairs_more_than_the_length_of_the_answer():
    flags, repairs, chars = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0]), np.array([900, 80, 999_999, 2**33])
    assert np.argsort(badness(flags, repairs, chars)).tolist() == [0, 1, 2, 3]


def test_clusters_are_transitive():
    assert near(None, None, None, pairs=[(0, 1), (1, 2)])[1] == [0, 0, 0]


@pytest.mark.parametrize(("anchor", "code"), [(TRAIN, DUPLICATE), (TEST, NEAR_TEST)])
def test_a_new_row_near_an_anchor_leaves_and_never_trains_near_a_held_out_row(anchor, code):
    assert near(anchor, None, pairs=[(0, 1)]) == ([KEPT, code], [0, 0])


def test_a_held_out_row_that_has_left_the_data_still_keeps_its_copies_out():
    assert near(TEST, None, pairs=[(0, 1)], absent=[0])[0] == [ABSENT, NEAR_TEST]


def test_a_copy_known_as_such_stays_a_duplicate_in_every_later_run():
    assert near(TEST, COPY_OF_TEST, pairs=[(0, 1)])[0] == [KEPT, DUPLICATE]


def test_a_known_copy_whose_original_is_gone_stands_in_for_it():
    assert near(COPY_OF_TRAIN, None, pairs=[(0, 1)])[0] == [KEPT, DUPLICATE]


def test_a_row_between_two_splits_goes_to_quarantine_and_both_anchors_stay():
    assert near(TRAIN, TEST, None, pairs=[(0, 2), (1, 2)])[0] == [KEPT, KEPT, BRIDGES]


def test_a_training_row_directly_near_a_held_out_row_leaves_training():
    assert near(TRAIN, TEST, pairs=[(0, 1)]) == ([NEAR_TEST, KEPT], [1, 1])


def test_exact_copies_inherit_what_is_known_of_any_of_them():
    found, after = resolve_exact(np.array([7, 7, 7]), rows(None, TEST, None, absent=[1]))
    assert found.states.tolist() == [KEPT, ABSENT, DUPLICATE]
    assert after.known[0] == TEST


def test_rows_without_copies_are_kept():
    assert resolve_exact(np.array([3, 1, 2]), rows(None, None, None))[0].states.tolist() == [KEPT] * 3
