"""A row's split follows from a hash of what it teaches, and what was once assigned stays for ever.

So a new row never moves an old one, the order of rows means nothing, and neither a held-out row nor its answer asked
in other words reaches training.
"""

import hashlib
from collections.abc import Collection, Hashable, Mapping
from typing import Final, Literal, NamedTuple, TypeVar

from data_contracts.errors import DataError, Problem

Split = Literal["train", "validation", "test"]
Member = TypeVar("Member", bound=Hashable)

_SALT: Final = "tunegate-split-v1:"  # another salt draws other splits
# Where known rows of one cluster disagree, the split that training sees least of wins.
PRECEDENCE: Final[tuple[Split, ...]] = ("test", "validation", "train")


class Known(NamedTuple):
    """What the ledger holds about a row: the split it was first given, and whether it was kept or a duplicate then."""

    split: Split
    kept: bool


class Fractions(NamedTuple):
    """Shares of the groups and caps in rows."""

    test: float
    max_test: int
    validation: float
    max_validation: int


def position(group: str) -> float:
    """A number in [0, 1), uniform over groups and fixed for each of them."""
    return int(hashlib.sha256(f"{_SALT}{group}".encode()).hexdigest()[:13], 16) / 16**13


def assign_splits(
    groups: Mapping[Member, str],
    known: Mapping[Member, Known],
    fractions: Fractions,
    uncounted: Collection[Member] = frozenset(),
) -> dict[Member, Split]:
    """The split of every member; `groups` names what each teaches, and rows that teach the same stay together.

    Known rows keep their split and new rows of their group follow them, even past a cap. Any other group that does not
    fit under the cap goes to training as a whole. Caps count the rows of this data set, not members that are `uncounted`:
    rows that have left it, and what is no row. Raises DataError if no row would be left to test or to train on.
    """
    splits = {row: known[row].split for row in groups if row in known}
    held_out = [split for row, split in splits.items() if row not in uncounted]
    room: dict[Split, int] = {
        "test": fractions.max_test - held_out.count("test"),
        "validation": fractions.max_validation - held_out.count("validation"),
        "train": len(groups),
    }
    members: dict[str, list[Member]] = {}
    for row, group in groups.items():
        members.setdefault(group, []).append(row)
    largest = 0
    for place, group in sorted((position(group), group) for group in members):
        new = [row for row in members[group] if row not in known]
        earlier = {splits[row] for row in members[group] if row in known}
        split = min(earlier, key=PRECEDENCE.index) if earlier else _drawn(place, fractions)
        counted = sum(row not in uncounted for row in new)
        if not earlier and room[split] < counted:
            split = "train"
        largest = max(largest, 0 if earlier else counted)
        room[split] -= counted
        splits.update((row, split) for row in new)
    _check([split for row, split in splits.items() if row not in uncounted], fractions, largest)
    return splits


def _drawn(place: float, fractions: Fractions) -> Split:
    if place < fractions.test:
        return "test"
    return "validation" if place < fractions.test + fractions.validation else "train"


def _check(splits: list[Split], fractions: Fractions, largest: int) -> None:
    for split in ("test", "train"):
        if split not in splits:
            raise DataError(
                Problem(
                    f"no row falls into the {split} split ({len(splits)} distinct rows, "
                    f"test_fraction {fractions.test}, max_test_rows {fractions.max_test}, "
                    f"validation_fraction {fractions.validation}, {largest} new rows in the largest group)",
                    "curate",
                    "at least one row to test and one to train on",
                    "add rows, or change the share with --set curate.test_fraction=0.2",
                )
            )
