"""Token sequences packed into one row as a prefix tree: every shared prefix is computed once, nothing is padded.

Sequences that start alike (one chat template, four answers to one question) share the tokens of their common start. A
token sees its ancestors in the tree and nothing else, so each sequence gets exactly the logits that it would get alone.
Shape suffixes: T tokens in the packed row, K positions whose logits are needed, N scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int]


@dataclass(frozen=True)
class Scored:
    """A sequence of token ids of which those from `start` on are scored, each given all before it; 1 <= start < len."""

    ids: Ids
    start: int


@dataclass(frozen=True)
class Pack:
    """One packed row. Arrays are int64."""

    input_ids_T: NDArray[np.int64]
    position_ids_T: NDArray[np.int64]
    subtree_end_T: NDArray[np.int64]  # one past the last token that descends from this one
    keep_K: NDArray[np.int64]  # packed positions whose logits predict a scored token
    logit_index_N: NDArray[np.int64]  # which of the K logits predicts each scored token; 0..N-1 if K equals N
    targets_N: NDArray[np.int64]  # the scored tokens, sequence after sequence
    sequence_N: NDArray[np.int64]  # which sequence each scored token belongs to

    def attention_mask_TT(self) -> NDArray[np.bool_]:
        """True where row i may look at column j: j is i or an ancestor of i.

        In depth-first order the descendants of j are the tokens j <= i < subtree_end[j].
        """
        i = np.arange(len(self.input_ids_T))[:, None]
        j = np.arange(len(self.input_ids_T))[None, :]
        mask: NDArray[np.bool_] = (j <= i) & (i < self.subtree_end_T[None, :])
        return mask


def shared_length(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def pack(sequences: Sequence[Scored]) -> Pack:
    """Lay sequences out as one prefix tree in depth-first order.

    The last token of a sequence is only ever a target, so it takes no place in the row. Raises ValueError on a sequence
    without a token before its first scored one, or without a scored token.
    """
    for sequence in sequences:
        if not 1 <= sequence.start < len(sequence.ids):
            raise ValueError(f"cannot score tokens {sequence.start}.. of a sequence of {len(sequence.ids)}")
    ids: list[int] = []
    positions: list[int] = []
    paths: dict[int, list[int]] = {}
    path: list[int] = []
    previous: Ids = ()
    # Sorted, sequences with a common prefix are neighbours, and walking them is a depth-first walk of the tree.
    for index in sorted(range(len(sequences)), key=lambda i: list(sequences[i].ids[:-1])):
        inputs = sequences[index].ids[:-1]
        shared = shared_length(previous, inputs)
        path = path[:shared] + list(range(len(ids), len(ids) + len(inputs) - shared))
        ids.extend(inputs[shared:])
        positions.extend(range(shared, len(inputs)))
        paths[index] = path
        previous = inputs
    ends = np.arange(1, len(ids) + 1)
    for path in paths.values():
        np.maximum.at(ends, path, path[-1] + 1)
    return _score(sequences, paths, np.asarray(ids), np.asarray(positions), ends)


def _score(
    sequences: Sequence[Scored],
    paths: dict[int, list[int]],
    ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> Pack:
    nodes = np.concatenate([paths[i][s.start - 1 :] for i, s in enumerate(sequences)])
    keep, logit_index = np.unique(nodes, return_inverse=True)
    if len(keep) == len(nodes):  # nothing shared: logits in the order of the targets need no second copy
        keep, logit_index = nodes, np.arange(len(nodes))
    return Pack(
        input_ids_T=ids,
        position_ids_T=positions,
        subtree_end_T=ends,
        keep_K=keep,
        logit_index_N=logit_index,
        targets_N=np.concatenate([np.asarray(s.ids[s.start :]) for s in sequences]),
        sequence_N=np.repeat(np.arange(len(sequences)), [len(s.ids) - s.start for s in sequences]),
    )


def group_for_packing(sequences: Sequence[Scored], most_tokens: int) -> Iterator[list[int]]:
    """Yield groups of sequence indices, neighbours in prefix order, each of at most `most_tokens` packed tokens.

    A sequence longer than that stands alone.
    """
    group: list[int] = []
    tokens = 0
    previous: Ids = ()
    for index in sorted(range(len(sequences)), key=lambda i: list(sequences[i].ids)):
        ids = sequences[index].ids
        added = len(ids) - shared_length(previous, ids)
        if group and tokens + added > most_tokens:
            yield group
            group, tokens, added = [], 0, len(ids)
        group.append(index)
        tokens += added
        previous = ids
    if group:
        yield group


def plan_batches(lengths: Sequence[int], batch_tokens: int, epochs: int, seed: int) -> list[list[int]]:
    """Every optimiser step's rows, for all epochs: shuffled anew each epoch, filled up to `batch_tokens`.

    Deterministic in its arguments, so that every arm sees the same rows in the same order and a resumed run can skip
    to where it was. A row longer than the budget stands alone.
    """
    rng = np.random.default_rng(seed)
    plan: list[list[int]] = []
    for _ in range(epochs):
        batch: list[int] = []
        tokens = 0
        for index in rng.permutation(len(lengths)).tolist():
            if batch and tokens + lengths[index] > batch_tokens:
                plan.append(batch)
                batch, tokens = [], 0
            batch.append(index)
            tokens += lengths[index]
        if batch:
            plan.append(batch)
    return plan
