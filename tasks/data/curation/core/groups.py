"""Rows that must stay on one side of the split: they share an answer, a patient, a manual, directly or through others."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple

from tasks.data.curation.core.split import PRECEDENCE, Known, Member, Split


@dataclass(frozen=True, slots=True)
class SameAnswer:
    """The key of rows that teach the same answer."""

    hash: int

    def __str__(self) -> str:
        return f"answer {self.hash}"


@dataclass(frozen=True, slots=True)
class Cluster:
    """The key of rows that the user's own field puts together: unlike an answer it is never in two splits."""

    name: str

    def __str__(self) -> str:
        return f"cluster {self.name}"


# A text is a key by its own name: the id of a row that shares nothing, or a digest. As text, keys order and name groups
# and draw their splits, so that text must never change.
Key = SameAnswer | Cluster | str


class Joined(NamedTuple, Generic[Member]):
    """groups: the group of every member that fits into one. torn: members that would tie two splits together."""

    groups: dict[Member, str]
    torn: set[Member]


def join(keys: Mapping[Member, Sequence[Key]], known: Mapping[Member, Known] | None = None) -> Joined[Member]:
    """Join members that share a key, directly or through others; the group of known members is named by their split.

    keys: one or more for each member. A new member whose keys are in two splits is torn, and so is a known one that its
    cluster has left behind; neither ties anything. Any other group is named by the first of its keys, clusters first, so
    that neither the order of the members nor (for a cluster) further ones change its name.
    """
    known = known or {}
    splits = _splits(keys, known)
    holders: dict[Key, list[Member]] = {}
    for member in keys:
        for key in keys[member] if member not in known else ():
            holders.setdefault(key, []).append(member)
    names: dict[Key, str] = dict(splits)
    torn = {member for member in keys.keys() & known.keys() if _left_behind(keys[member], splits, known[member])}
    for start in [*sorted(splits, key=str), *sorted(holders, key=_clusters_first)]:
        if start not in holders:  # an earlier key has reached it, or only known members hold it
            continue
        reached, between = _spread(start, keys, holders, names)
        names.update(dict.fromkeys(reached, names.get(start, str(start))))
        torn |= between
        for key in reached:
            del holders[key]
    groups = {
        member: known[member].split if member in known else names[keys[member][0]]
        for member in keys
        if member not in torn
    }
    return Joined(groups, torn)


_RANK: Final[dict[Split, int]] = {split: rank for rank, split in enumerate(PRECEDENCE)}


def _splits(keys: Mapping[Member, Sequence[Key]], known: Mapping[Member, Known]) -> dict[Key, Split]:
    """The split of every key of known members; where they disagree the one that training sees least of."""
    found: dict[Key, Split] = {}
    for member in keys.keys() & known.keys():
        split = known[member].split
        for key in keys[member]:
            found[key] = min(found.get(key, split), split, key=_RANK.__getitem__)
    return found


def _left_behind(keys: Sequence[Key], splits: Mapping[Key, Split], known: Known) -> bool:
    return any(isinstance(key, Cluster) and splits[key] != known.split for key in keys)


def _clusters_first(key: Key) -> tuple[bool, str]:
    return not isinstance(key, Cluster), str(key)


def _spread(
    start: Key, keys: Mapping[Member, Sequence[Key]], holders: Mapping[Key, Sequence[Member]], names: Mapping[Key, str]
) -> tuple[set[Key], set[Member]]:
    """`start` and all keys without a name that are tied to it, and the members that hold one of another name as well."""
    own = names.get(start, str(start))
    reached, torn = {start}, set[Member]()
    waiting = deque([start])
    while waiting:
        for member in holders[waiting.popleft()]:
            if any(names.get(key, own) != own for key in keys[member]):
                torn.add(member)
                continue
            new = [key for key in keys[member] if key not in names and key not in reached]
            reached.update(new)
            waiting += new
    return reached, torn
