"""Rows that must stay on one side of the split: they share an answer, a patient, a manual, directly or through others."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from tasks.data.curation.core.split import PRECEDENCE, Known

_CLUSTER: Final = "cluster "


class Joined(NamedTuple):
    """groups: the group of every row that fits into one. torn: rows that would tie together what lies in two splits."""

    groups: dict[str, str]
    torn: set[str]


def cluster_key(cluster: str) -> str:
    """The key of rows that the user's own field puts together: unlike an answer it never lies in two splits."""
    return f"{_CLUSTER}{cluster}"


def join(keys: Mapping[str, Sequence[str]], known: Mapping[str, Known] | None = None) -> Joined:
    """Join rows that share a key, directly or through others; what is tied to known rows has the name of their split.

    keys: one or more for each row. A new row whose keys lie in two splits is torn, and so is a known one that its cluster
    has left behind; neither ties anything. Any other group is named by the first of its keys, clusters first, so that
    neither the order of the rows nor (for a cluster) further ones change its name.
    """
    known = known or {}
    label = _splits(keys, known)
    holders: dict[str, list[str]] = {}
    for row in sorted(keys.keys() - known.keys()):
        for key in keys[row]:
            holders.setdefault(key, []).append(row)
    torn = {row for row in keys.keys() & known.keys() if _left_behind(keys[row], label, known[row])}
    for start in [*sorted(label), *sorted(holders, key=lambda key: (not key.startswith(_CLUSTER), key))]:
        _spread(start, keys, holders, label, torn)
    groups = {row: known[row].split if row in known else label[keys[row][0]] for row in keys if row not in torn}
    return Joined(groups, torn)


def _splits(keys: Mapping[str, Sequence[str]], known: Mapping[str, Known]) -> dict[str, str]:
    """The split of every key of known rows; where they disagree the one that training sees least of."""
    found: dict[str, str] = {}
    for row in keys.keys() & known.keys():
        for key in keys[row]:
            found[key] = min(found.get(key, known[row].split), known[row].split, key=_RANK.__getitem__)
    return found


_RANK: Final[dict[str, int]] = {split: rank for rank, split in enumerate(PRECEDENCE)}


def _left_behind(keys: Sequence[str], label: Mapping[str, str], known: Known) -> bool:
    return any(key.startswith(_CLUSTER) and label[key] != known.split for key in keys)


def _spread(
    start: str, keys: Mapping[str, Sequence[str]], holders: dict[str, list[str]], label: dict[str, str], torn: set[str]
) -> None:
    """Give a key's label to all that hangs together with it."""
    own = label.setdefault(start, start)
    waiting = deque([start])
    while waiting:
        for row in holders.pop(waiting.popleft(), ()):
            if any(label.get(key, own) != own for key in keys[row]):
                torn.add(row)
                continue
            new = [key for key in keys[row] if key not in label]
            label.update(dict.fromkeys(new, own))
            waiting += new
