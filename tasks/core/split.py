"""A row's split follows from a hash of what it teaches, and what was once assigned stays for ever.

So a new row never moves an old one, the order of rows means nothing, and neither a held-out row nor its answer asked
in other words reaches training.
"""

import hashlib
from collections.abc import Collection, Mapping
from typing import Final, Literal, NamedTuple

from data_contracts.errors import DataError, Problem

Split = Literal["train", "validation", "test"]

_SALT: Final = "tunegate-split-v1:"  # another salt draws other splits
# Where known rows of one cluster disagree, the split that training sees least of wins.
_PRECEDENCE: Final[tuple[Split, ...]] = ("test", "validation", "train")


class Known(NamedTuple):
    """What the ledger says about a row: the split it was first given, and whether it was kept or a duplicate then."""

    split: Split
    kept: bool


class Fractions(NamedTuple):
    """Shares of the groups and caps in rows."""

    test: float
    max_test: int
    validation: float
    max_validation: int


def representative(row_ids: Collection[str], known: Mapping[str, Known]) -> str:
    """The row that stands for its cluster: a known one (held-out first, once-kept first), else the smallest id."""

    def rank(row_id: str) -> tuple[int, bool, str]:
        row = known.get(row_id)
        return (_PRECEDENCE.index(row.split), not row.kept, row_id) if row else (len(_PRECEDENCE), True, row_id)

    return min(row_ids, key=rank)


def position(group: str) -> float:
    """A number in [0, 1), uniform over groups and fixed for each of them."""
    return int(hashlib.sha256(f"{_SALT}{group}".encode()).hexdigest()[:13], 16) / 16**13


def assign_splits(groups: Mapping[str, str], known: Mapping[str, Known], fractions: Fractions) -> dict[str, Split]:
    """The split of every representative; `groups` names what it teaches, and rows that teach the same stay together.

    Known rows keep their split and new rows of their group follow them, even past a cap. Any other group that does not
    fit under the cap goes to training as a whole; caps count the known rows of this data set.
    Raises DataError if no row would be left to test or to train on.
    """
    splits = {row_id: known[row_id].split for row_id in groups if row_id in known}
    held_out = list(splits.values())
    room: dict[Split, int] = {
        "test": fractions.max_test - held_out.count("test"),
        "validation": fractions.max_validation - held_out.count("validation"),
        "train": len(groups),
    }
    members: dict[str, list[str]] = {}
    for row_id, group in groups.items():
        members.setdefault(group, []).append(row_id)
    for group in sorted(members, key=lambda group: (position(group), group)):
        new = [row_id for row_id in members[group] if row_id not in known]
        before = {splits[row_id] for row_id in members[group] if row_id in known}
        split = min(before, key=_PRECEDENCE.index) if before else _drawn(position(group), fractions)
        if not before and room[split] < len(new):
            split = "train"
        room[split] -= len(new)
        splits.update((row_id, split) for row_id in new)
    _check(list(splits.values()), fractions)
    return splits


def _drawn(place: float, fractions: Fractions) -> Split:
    if place < fractions.test:
        return "test"
    return "validation" if place < fractions.test + fractions.validation else "train"


def _check(splits: list[Split], fractions: Fractions) -> None:
    for split in ("test", "train"):
        if split not in splits:
            raise DataError(
                Problem(
                    f"no row falls into the {split} split ({len(splits)} distinct rows, "
                    f"test_fraction {fractions.test}, max_test_rows {fractions.max_test}, "
                    f"validation_fraction {fractions.validation})",
                    "curate",
                    "at least one row to test and one to train on",
                    "add rows, or change the share with --set curate.test_fraction=0.2",
                )
            )
