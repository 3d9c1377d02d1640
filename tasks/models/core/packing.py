"""Token sequences packed into one row as a prefix tree: every shared prefix is computed once, nothing is padded.

Sequences that start alike (one chat template, four answers to one question) share the tokens of their common start. A
token sees its ancestors in the tree and nothing else, so each sequence gets exactly the logits that it would get alone.
Shape suffixes: T tokens in the packed row, K positions whose logits are needed, N scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int]
Way = Literal["packed", "padded"]
"""How a batch is laid out: as one prefix tree, or a row for each sequence with padding."""


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence of token ids of which those from `start` on are scored, each given all before it; 1 <= start < len."""

    ids: Ids
    start: int


class Segment(NamedTuple):
    """Tokens in a row that attention is computed for together: nodes of their own, and those that all of them follow.

    A token of the segment sees every token of `ancestors`, and its own nodes up to itself.
    """

    own: tuple[int, ...]
    ancestors: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """The shape of a packed row."""

    node_tokens: tuple[int, ...]  # the row cut wherever the tree branches: tokens of each piece
    segments: tuple[Segment, ...]  # in the order of the row

    @property
    def seen(self) -> tuple[tuple[int, int], ...]:
        """Of each segment: its own tokens, and all that its last token sees."""
        counts = [(self._count(own), self._count(ancestors)) for own, ancestors in self.segments]
        return tuple((own, own + followed) for own, followed in counts)

    def _count(self, nodes: tuple[int, ...]) -> int:
        return sum(self.node_tokens[node] for node in nodes)


@dataclass(frozen=True)
class Pack:
    """One packed row. Arrays are int64."""

    input_ids_T: NDArray[np.int64]
    position_ids_T: NDArray[np.int64]
    tree: Tree
    keep_K: NDArray[np.int64]  # packed positions whose logits predict a scored token
    logit_index_N: NDArray[np.int64]  # which of the K logits predicts each scored token; 0..N-1 if K equals N
    targets_N: NDArray[np.int64]  # the scored tokens, sequence after sequence


def shared_length(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def pack(sequences: Sequence[ScoredSequence]) -> Pack:
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
    starts: list[tuple[int, list[int]]] = []  # of each segment: its first token, and the tokens that it follows
    path: list[int] = []
    previous: Ids = ()
    # Sorted, sequences with a common prefix are neighbours, and walking them is a depth-first walk of the tree.
    for index in sorted(range(len(sequences)), key=lambda i: list(sequences[i].ids[:-1])):
        inputs = sequences[index].ids[:-1]
        shared = shared_length(previous, inputs)
        if shared < len(inputs):
            starts.append((len(ids), path[:shared]))
        path = path[:shared] + list(range(len(ids), len(ids) + len(inputs) - shared))
        ids.extend(inputs[shared:])
        positions.extend(range(shared, len(inputs)))
        paths[index] = path
        previous = inputs
    return Pack(np.asarray(ids), np.asarray(positions), _tree(starts, len(ids)), *_score(sequences, paths))


def _tree(starts: list[tuple[int, list[int]]], tokens: int) -> Tree:
    """A node ends where a segment does or where another branches off."""
    edges = {start for start, _ in starts} | {follows[-1] + 1 for _, follows in starts if follows} | {tokens}
    bounds = np.array(sorted(edges))
    firsts = bounds[:-1]
    ends = [start for start, _ in starts[1:]] + [tokens]
    segments = [
        Segment(
            own=tuple(range(*np.searchsorted(firsts, [start, end]).tolist())),
            ancestors=tuple(np.unique(np.searchsorted(firsts, follows, side="right") - 1).tolist()),
        )
        for (start, follows), end in zip(starts, ends, strict=True)
    ]
    return Tree(tuple(np.diff(bounds).tolist()), tuple(segments))


def _score(
    sequences: Sequence[ScoredSequence], paths: dict[int, list[int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """keep_K, logit_index_N, targets_N."""
    nodes = np.concatenate([paths[i][s.start - 1 :] for i, s in enumerate(sequences)])
    keep, logit_index = np.unique(nodes, return_inverse=True)
    if len(keep) == len(nodes):  # nothing shared: logits in the order of the targets need no second copy
        keep, logit_index = nodes, np.arange(len(nodes))
    targets = np.concatenate([np.asarray(s.ids[s.start :]) for s in sequences])
    return keep, logit_index, targets


def group_for_packing(sequences: Sequence[ScoredSequence], most_tokens: int) -> Iterator[list[int]]:
    """Yield groups of sequence indices, neighbours in prefix order, each of at most `most_tokens` packed tokens.

    A sequence longer than that is a group of its own.
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


def shares(sequences: Sequence[ScoredSequence], ranks: int) -> list[list[int]]:
    """Divide sequences among ranks: each gets neighbours in prefix order, and as many tokens within half a sequence.

    With fewer sequences than ranks, some get none.
    """
    parts: list[list[int]] = [[] for _ in range(ranks)]
    tokens, total = 0.0, sum(len(sequence.ids) for sequence in sequences)
    for index in sorted(range(len(sequences)), key=lambda i: list(sequences[i].ids)):
        length = len(sequences[index].ids)
        parts[int((tokens + length / 2) * ranks / total)].append(index)
        tokens += length
    return [sorted(part) for part in parts]


def plan_batches(lengths: Sequence[int], batch_tokens: int, epochs: int, seed: int) -> list[list[int]]:
    """Every optimiser step's rows, for all epochs: shuffled again each epoch, filled up to `batch_tokens`.

    Deterministic in its arguments, so that every arm sees the same rows in the same order and a resumed run can skip
    to where it was. A row longer than the budget is a step of its own.
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


BLOCK_ROWS = BLOCK_COLUMNS = 2048
"""ScoredSequence tokens and words of the vocabulary whose logits tasks/models/workers/head_loss.py has at a time: 16
MiB in fp32."""
QUERIES, MASK_TOKENS = 128, 1024
"""Queries that tasks/models/workers/tree_attention.py takes at a time on a CPU, and in which steps their one mask
grows."""
