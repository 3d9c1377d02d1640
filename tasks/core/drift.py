"""How far a batch lies from the one before, from two small profiles: no row of the earlier batch is needed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

Profile = dict[str, Any]

_QUANTILES: Final = 1001
_SMOOTHING: Final = 0.5  # rows added to every category, so that a new one has no infinite divergence
LENGTHS: Final = ("prompt_chars", "completion_chars")
SHARES: Final = ("source", "language")


def profile(lengths: Mapping[str, Sequence[int]], counts: Mapping[str, Mapping[str, int]]) -> Profile:
    """1001 quantiles of every length and the count of every category."""
    grid = np.linspace(0, 1, _QUANTILES)
    quantiles = {
        name: np.quantile(np.asarray(values), grid).tolist() if len(values) else [] for name, values in lengths.items()
    }
    return {"lengths": quantiles, "counts": {name: dict(values) for name, values in counts.items()}}


def drift(now: Profile, before: Profile) -> dict[str, float]:
    """`ks_LENGTH` in [0, 1] and `kl_SHARE` >= 0 in nats, for every length and share."""
    found = {f"ks_{name}": ks_distance(now["lengths"][name], before["lengths"][name]) for name in LENGTHS}
    return found | {f"kl_{name}": divergence(now["counts"][name], before["counts"][name]) for name in SHARES}


def ks_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest distance of two empirical distribution functions (Kolmogorov-Smirnov); 0 if one has no values."""
    if not len(a) or not len(b):
        return 0.0
    points = np.union1d(a, b)
    of_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    of_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.abs(of_a - of_b).max())


def divergence(now: Mapping[str, int], before: Mapping[str, int]) -> float:
    """Kullback-Leibler divergence of the shares now from those before, in nats, with half a row in every category."""
    names = set(now) | set(before)
    of_now = {name: now.get(name, 0) + _SMOOTHING for name in names}
    of_before = {name: before.get(name, 0) + _SMOOTHING for name in names}
    total_now, total_before = sum(of_now.values()), sum(of_before.values())
    return sum(
        of_now[name] / total_now * math.log(of_now[name] / total_now * total_before / of_before[name])
        for name in sorted(names)
    )
