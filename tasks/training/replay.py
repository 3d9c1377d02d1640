"""A warm start: whether an adapter can go on in another arm, and which rows it then sees."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

_SALT: Final = "tunegate-replay-v1:"
_ALIKE: Final = {
    "peft_type": "kind",
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""What two adapters must share, as PEFT calls it and as people do. Dropout may differ: it is no part of what was learnt."""


class Form(NamedTuple):
    """An adapter as PEFT's configuration and the names of its tensors tell it."""

    config: Mapping[str, Any]
    tensors: Collection[str]

    @property
    def layers(self) -> set[str]:
        """target_modules can name the same layers in several ways."""
        return {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in self.tensors}


class Chosen(NamedTuple):
    """Row ids of a warm start."""

    new: list[str]
    old: list[str]
    replayed: list[str]


def choose(row_ids: Sequence[str], known: Collection[str], share: float) -> Chosen:
    """Every row that is not known, and so many known ones that they make `share` of all; all of them if they are too few.

    Replayed are those whose ids have the lowest hash: the same ones each time, whatever else comes. In the given order.
    """
    new = [row for row in row_ids if row not in known]
    old = [row for row in row_ids if row in known]
    wanted = len(old) if share == 1.0 else math.floor(len(new) * share / (1.0 - share) + 0.5)
    lowest = set(sorted(old, key=_hash)[:wanted])
    return Chosen(new, old, [row for row in old if row in lowest])


def _hash(row_id: str) -> str:
    return hashlib.sha256(f"{_SALT}{row_id}".encode()).hexdigest()


def differences(theirs: Form, ours: Form) -> list[str]:
    """In what an adapter is of another form than a fresh one of an arm; none if it fits."""
    pairs = {name: (theirs.config.get(key), ours.config.get(key)) for key, name in _ALIKE.items()}
    found = [f"{name} {there} there and {here} here" for name, (there, here) in pairs.items() if there != here]
    if layers := theirs.layers ^ ours.layers:
        more = f"such as {min(layers)}"
        found.append(f"{len(theirs.layers)} adapted layers there and {len(ours.layers)} here, not the same ({more})")
    return found
