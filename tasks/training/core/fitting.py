"""Which cards a training step fits, the most that fits, and what to change where it does not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tasks.training.core.architecture import Architecture
from tasks.training.core.memory import predict
from tasks.training.core.memory_settings import Settings

CARDS_GB = (8, 12, 16, 24, 40, 48, 80)
USABLE = 0.985
"""What CUDA offers of a card's nominal GiB: 23.65 of 24 (RTX 4090), 47.4 of 48 (A6000), 79.1 of 80 (A100)."""
MARGIN = 0.1
"""Where less than this share of a card stays free, a plan is tight: half of the published peaks are 5 % off or more."""
MOST_TOKENS = 2**20
SHORTEST, SMALLEST_RANK = 256, 8


@dataclass(frozen=True)
class Change:
    """One change on top of those before it: what it saves, and what is needed after it, in bytes."""

    what: str
    saves: int
    total: int


@dataclass(frozen=True)
class Card:
    """What a card of `gigabytes` can do. `changes` is empty if the step fits as asked, None if nothing makes it fit."""

    gigabytes: float
    changes: tuple[str, ...] | None
    tight: bool
    most_rows: int
    longest_row: int

    @property
    def fits(self) -> bool:
        return self.changes == ()


def usable_bytes(gigabytes: float) -> int:
    return int(gigabytes * USABLE * 2**30)


def needed(arch: Architecture, settings: Settings) -> int:
    """Bytes a card must have. Paged states that find no room move to host memory, so they need none."""
    parts = predict(arch, settings)
    return parts.total - parts.paged


def card(arch: Architecture, settings: Settings, gigabytes: float) -> Card:
    room = usable_bytes(gigabytes)
    made, total = changes_that_fit(arch, settings, room)
    return Card(
        gigabytes=gigabytes,
        changes=made,
        tight=made is not None and total > (1 - MARGIN) * room,
        most_rows=_most(lambda rows: needed(arch, replace(settings, batch=rows)) <= room),
        longest_row=_most(lambda length: needed(arch, replace(settings, batch=1, length=length)) <= room),
    )


def changes_that_fit(arch: Architecture, settings: Settings, room: int) -> tuple[tuple[str, ...] | None, int]:
    """(the shortest beginning of `changes` that makes the step fit, bytes needed then); None if all do not."""
    total = needed(arch, settings)
    made: list[str] = []
    for change in changes(arch, settings):
        if total <= room:
            break
        made.append(change.what)
        total = change.total
    return (tuple(made) if total <= room else None), total


def changes(arch: Architecture, settings: Settings) -> list[Change]:
    """Changes one after the other, the harmless ones first; those that save nothing are left out."""
    found: list[Change] = []
    before = needed(arch, settings)
    for what, changed in _ladder(settings):
        total = needed(arch, changed)
        if total < before:
            found.append(Change(what, before - total, total))
        before = min(before, total)
    return found


def _ladder(settings: Settings) -> Iterator[tuple[str, Settings]]:
    now = settings
    if now.is_quantised and not now.double_quant:
        now = replace(now, double_quant=True)
        yield "train.double_quant=true", now
    if not now.checkpointing:
        now = replace(now, checkpointing=True)
        yield "train.activation_checkpointing=true", now
    if now.optimiser != "paged_adamw_8bit":
        now = replace(now, optimiser="paged_adamw_8bit")
        yield "train.optimizer=paged_adamw_8bit", now
    if now.method != "qlora":
        now = replace(now, method="qlora")
        yield "--method qlora", now
    if now.batch > 1:
        now = replace(now, batch=1)
        yield f"train.batch_tokens={now.length}", now
    while now.length > SHORTEST:
        now = replace(now, length=max(SHORTEST, now.length // 2))
        yield f"train.max_tokens={now.length}", now
    if now.rank > SMALLEST_RANK:
        now = replace(now, rank=SMALLEST_RANK)
        yield f"train.rank={SMALLEST_RANK}", now


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number up to MOST_TOKENS that fits; memory only grows with it. 0 if 1 does not."""
    low, high = 0, 1
    while high <= MOST_TOKENS and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
