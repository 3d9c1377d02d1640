"""Packed prefix trees give every sequence the logits that it gets alone. Run: pytest tests/models/test_packing.py"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.core.packing import ScoredSequence, group_for_packing, pack, plan_batches
from tests.support.packed import attention_mask_TT

sequences = st.lists(
    st.lists(st.integers(0, 3), min_size=2, max_size=8).flatmap(
        lambda ids: st.integers(1, len(ids) - 1).map(lambda start: ScoredSequence(ids, start))
    ),
    min_size=1,
    max_size=6,
)


@given(sequences)
def test_the_segments_hold_every_token_once_in_the_order_of_the_row(rows):
    packed = pack(rows)
    assert sum(packed.tree.node_tokens) == len(packed.input_ids_T)
    assert [node for segment in packed.tree.segments for node in segment.own] == list(
        range(len(packed.tree.node_tokens))
    )


@given(sequences)
def test_each_scored_token_sees_exactly_its_own_sequence(rows):
    packed = pack(rows)
    mask = attention_mask_TT(packed)
    owners = [i for i, row in enumerate(rows) for _ in row.ids[row.start :]]
    seen: dict[int, list[int]] = {}
    for n, target in enumerate(packed.targets_N):
        position = packed.keep_K[packed.logit_index_N[n]]
        context = packed.input_ids_T[mask[position]].tolist()
        row = rows[owners[n]]
        done = seen.setdefault(owners[n], [])
        assert context == list(row.ids[: row.start + len(done)])
        assert packed.position_ids_T[mask[position]].tolist() == list(range(len(context)))
        done.append(int(target))
    assert {i: list(row.ids[row.start :]) for i, row in enumerate(rows)} == seen


def test_a_shared_prefix_is_stored_once():
    rows = [ScoredSequence([1, 2, 3, 4, 5, 6], 4), ScoredSequence([1, 2, 3, 7, 8, 9], 4)]
    assert len(pack(rows).input_ids_T) == 3 + 2 + 2  # the last token of each is only a target


def test_a_sequence_without_context_or_target_is_refused():
    for row in (ScoredSequence([1, 2], 0), ScoredSequence([1, 2], 2)):
        with pytest.raises(ValueError, match="cannot score"):
            pack([row])


@given(sequences, st.integers(2, 12))
def test_groups_hold_every_sequence_once_and_keep_to_the_budget(rows, most):
    groups = list(group_for_packing(rows, most))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or len(pack([rows[i] for i in group]).input_ids_T) <= most


def test_a_plan_holds_every_row_once_an_epoch_and_is_the_same_for_every_arm():
    lengths = np.random.default_rng(0).integers(5, 60, size=100).tolist()
    plan = plan_batches(lengths, batch_tokens=128, epochs=2, seed=3)
    assert plan == plan_batches(lengths, batch_tokens=128, epochs=2, seed=3)
    assert sorted(i for batch in plan for i in batch) == sorted([*range(100), *range(100)])
    assert all(sum(lengths[i] for i in batch) <= 128 for batch in plan)
    assert plan != plan_batches(lengths, batch_tokens=128, epochs=2, seed=4)
