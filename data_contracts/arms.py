"""The arms of a run: each method and variant once with every seed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from data_contracts.run_spec import Method, TrainSpec


class Arm(NamedTuple):
    """One training. name: unique in the run; arm: what is compared over the seeds; dials: `train` as this arm sees it."""

    name: str
    arm: str
    method: Method
    seed: int
    dials: TrainSpec


def arms_of(train: TrainSpec) -> list[Arm]:
    """Methods in their order, then variants; of each one training a seed, in the order of the seeds."""
    own: list[tuple[str, Method, dict[str, Any]]] = [(method, method, {}) for method in train.methods]
    own += [(variant.name, variant.method, variant.dials) for variant in train.variants]
    return [
        Arm(name_of(arm, seed, train.seeds), arm, method, seed, train.of(method, dials))
        for arm, method, dials in own
        for seed in train.seeds
    ]


def name_of(arm: str, seed: int, seeds: Sequence[int]) -> str:
    """A single seed needs no name of its own."""
    return arm if len(seeds) == 1 else f"{arm}-{seed}"


def candidate_arm(arms: Sequence[str]) -> str:
    """The arm that may be released: qlora, else lora, else the last."""
    return next((name for name in ("qlora", "lora") if name in arms), arms[-1])
