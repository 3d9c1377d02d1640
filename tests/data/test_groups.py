"""Rows that share an answer, a patient or a manual stay on one side, whatever comes later. Run: pytest tests/data/test_groups.py"""

import random

import pytest

from tasks.data.curation.core.groups import Cluster, Key, join
from tasks.data.curation.core.split import PRECEDENCE, Fractions, Known, assign_splits

A, B = Cluster("a"), Cluster("b")
TRAIN, TEST = Known("train", True), Known("test", True)
HALF = Fractions(0.4, 10**6, 0.2, 10**6)


def test_rows_that_share_a_key_directly_or_through_others_are_one_group():
    found = join({"1": ["x"], "2": ["x", "y"], "3": ["y"], "4": ["z"]})
    assert found.groups == {"1": "x", "2": "x", "3": "x", "4": "z"}
    assert found.torn == set()


def test_a_group_is_named_by_its_cluster_so_that_another_answer_in_it_moves_nothing():
    assert set(join({"1": ["answer 7", B], "2": ["answer 1", B]}).groups.values()) == {str(B)}


def test_new_rows_follow_what_they_are_tied_to_also_through_others():
    found = join({"old": [A], "1": [A, "x"], "2": ["x"], "3": ["y"]}, {"old": TEST})
    assert found.groups == {"old": "test", "1": "test", "2": "test", "3": "y"}


def test_a_new_row_between_two_splits_fits_into_neither_and_ties_nothing():
    keys = {"held out": [A], "trained": [B], "between": [A, B], "further": ["x"], "own": ["x"]}
    found = join(keys, {"held out": TEST, "trained": TRAIN})
    assert found.torn == {"between"}
    assert found.groups == {"held out": "test", "trained": "train", "further": "x", "own": "x"}


def test_a_known_training_row_whose_cluster_is_held_out_leaves_and_one_with_such_an_answer_stays():
    known = {"1": TRAIN, "2": TEST}
    assert join({"1": [A], "2": [A]}, known).torn == {"1"}
    assert join({"1": ["answer 7"], "2": ["answer 7"]}, known).torn == set()


def test_names_that_are_no_rows_fill_no_room():
    groups = {str(i): f"group {i}" for i in range(40)} | {f"name {i}": f"group {i}" for i in range(40)}
    full = Fractions(0.5, 5, 0.0, 0)
    splits = assign_splits(groups, {}, full, {name for name in groups if name.startswith("name")})
    assert sum(split == "test" for row, split in splits.items() if not row.startswith("name")) == 5
    assert all(splits[f"name {i}"] == splits[str(i)] for i in range(40))


@pytest.mark.parametrize("seed", range(60))
def test_however_data_grow_no_cluster_is_ever_in_two_splits_and_no_row_moves(seed):
    draw = random.Random(seed)
    rows: dict[str, list[Key]] = {}
    known: dict[str, Known] = {}
    clusters: dict[Key, str] = {}
    for batch in range(5):
        for i in range(draw.randrange(10, 40)):
            answer = [f"answer {draw.randrange(120)}"] if draw.random() < 0.6 else []
            cluster = [Cluster(str(draw.randrange(40)))] if draw.random() < 0.6 else []
            rows[f"{batch}.{i}"] = [*answer, *cluster] or [f"{batch}.{i}"]
        keys = {row: rows[row] for row in draw.sample(sorted(rows), len(rows))}
        found = join(keys, known)
        assert found == join({row: keys[row] for row in sorted(keys)}, known), "the order of the rows means something"
        splits = assign_splits(found.groups, known, HALF)
        assert {row: splits[row] for row in known} == {row: seen.split for row, seen in known.items()}
        for row in found.torn:
            assert row not in known
        for row, split in splits.items():
            for key in filter(lambda key: isinstance(key, Cluster), rows[row]):
                assert clusters.setdefault(key, split) == split
        answers: dict[Key, set[str]] = {}
        for row, split in splits.items():
            for key in rows[row]:
                answers.setdefault(key, set()).add(split)
        assert all(len(found) == 1 for found in answers.values())
        known |= {row: Known(split, True) for row, split in splits.items()}
    assert {seen.split for seen in known.values()} == set(PRECEDENCE)
