"""Distance of a batch from the one before, from two small profiles: no row of the earlier batch is needed."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, TypedDict

import numpy as np


class Profile(TypedDict):
    """A batch in a few kilobytes. labels: of each source whose answers are labels; older versions wrote none."""

    lengths: dict[str, list[float]]
    counts: dict[str, dict[str, int]]
    labels: dict[str, dict[str, int]]


_QUANTILES: Final = 1001
_SMOOTHING: Final = 0.5  # rows added to every category, so that a new one has no infinite divergence
LENGTHS: Final = ("prompt_chars", "completion_chars")
SHARES: Final = ("source", "language")

# When the answers of a source are labels: most of them short, few, and seen again and again.
_LABEL_CHARS: Final = 80
_MAX_LABELS: Final = 200
_ROWS_PER_LABEL: Final = 5
_COVERED: Final = 0.9
OTHER: Final = "other"  # long, rare and unique answers together


def profile(
    lengths: Mapping[str, Sequence[int]],
    counts: Mapping[str, Mapping[str, int]],
    labels: Mapping[str, Mapping[str, int]],
) -> Profile:
    """1001 quantiles of every length, the count of every category, and of every label of the sources that have some."""
    grid = np.linspace(0, 1, _QUANTILES)
    quantiles = {
        name: np.quantile(np.asarray(values), grid).tolist() if len(values) else [] for name, values in lengths.items()
    }
    return {
        "lengths": quantiles,
        "counts": {name: dict(found) for name, found in counts.items()},
        "labels": {source: dict(found) for source, found in labels.items() if found},
    }


def labels(answers: np.ndarray, chars: np.ndarray) -> dict[str, int]:
    """How often each label of one source occurs, at most 200 and the rest as `other`; empty if its answers are none.

    `answers`: a hash for each row, `chars`: the answer's length. A label is named by its hash, never by its text.
    """
    values, counts = np.unique(answers[chars <= _LABEL_CHARS], return_counts=True)
    top = np.argsort(-counts, kind="stable")[:_MAX_LABELS]
    found = {str(values[i]): int(counts[i]) for i in top if counts[i] > 1}
    covered = sum(found.values())
    if covered < max(_COVERED * len(answers), _ROWS_PER_LABEL * len(found), 1):
        return {}
    return found | ({OTHER: len(answers) - covered} if covered < len(answers) else {})


def largest_label_share(now: Profile) -> float:
    """The largest share that one label has in its source; 0 without labels."""
    shares = (max(n for k, n in found.items() if k != OTHER) / sum(found.values()) for found in now["labels"].values())
    return max(shares, default=0.0)


def drift(now: Profile, before: Profile) -> dict[str, float]:
    """`ks_LENGTH` in [0, 1], `kl_SHARE` >= 0 in nats for every length and share, and `kl_label`."""
    found = {f"ks_{name}": ks_distance(now["lengths"][name], before["lengths"][name]) for name in LENGTHS}
    found |= {f"kl_{name}": divergence(now["counts"][name], before["counts"][name]) for name in SHARES}
    return found | {"kl_label": _label_drift(now, before)}


def _label_drift(now: Profile, before: Profile) -> float:
    """The largest divergence of labels among the sources that are in both and had labels before.

    A source that has none any more counts as one of `other` only. Profiles of older versions hold no labels.
    """
    rows, of_now = now["counts"]["source"], now["labels"]
    both = {source: found for source, found in before.get("labels", {}).items() if rows.get(source)}
    return max((divergence(of_now.get(s, {OTHER: rows[s]}), found) for s, found in both.items()), default=0.0)


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
