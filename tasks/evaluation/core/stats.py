"""Paired statistics: every interval resamples clusters of items that all models answered, and seeds where there are several.

Axes: S seeds, I items, C clusters of items that are not independent, K columns of sums, D draws. A statistic is a function
of K column sums, such as a ratio of two. Sources: Efron & Tibshirani 1993 (bootstrap, BCa: chapter 14), Owen 2007 (items and
seeds resampled apart), Holm 1979, Wilson 1927, McNemar 1947 in its exact form.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from data_contracts.verdict import Estimate, Interval

Floats = NDArray[np.float64]
Statistic = Callable[..., Floats]
_DRAWS_AT_ONCE = 500  # keeps the resampling matrix small
_TINY = 1e-9
POWER = 0.8  # chance of finding a difference that is there


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole; NaN where whole is not above zero."""
    found: Floats = np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)
    return found


class Bootstrap:
    """One set of draws for all estimates from the same items, so that they can be compared.

    clusters: the cluster of every item, by any name. confidence: level of each end of an interval alone.
    """

    def __init__(self, clusters: Sequence[str], draws: int, confidence: float, seed: int = 0) -> None:
        names, self.cluster_I = np.unique(np.asarray(clusters), return_inverse=True)
        self.clusters, self.draws, self.confidence = len(names), draws, confidence
        self._random = np.random.default_rng(seed)
        self._counts = [self._draw(min(_DRAWS_AT_ONCE, draws - start)) for start in range(0, draws, _DRAWS_AT_ONCE)]

    def _draw(self, draws: int) -> "NDArray[np.uint16]":
        shares = np.full(self.clusters, 1 / self.clusters)
        return self._random.multinomial(self.clusters, shares, size=draws).astype(np.uint16)

    def estimate(self, statistic: Statistic, *columns: Floats) -> Estimate:
        """A statistic of column sums with its interval: of each end the wider of BCa's and of Student's t on the jackknife's
        error. Either alone misses a little more often than it says (benchmarks/gates.py); one cluster alone shows nothing.

        columns: values of I items, or of S seeds by I items, the last one the weights; sums are means over seeds. A value that is not defined (a ratio
        over nothing) is NaN. Draws in which it is not defined count against both ends; too many leave no interval at all.
        """
        sums_SCK = self._sums(columns)
        sums_CK = sums_SCK.mean(axis=0)
        value = float(_of(statistic, sums_CK.sum(axis=0)))
        left_out_C = _of(statistic, sums_CK.sum(axis=0) - sums_CK)
        drawn_D = _of(statistic, self._drawn(sums_SCK))
        by_items, by_seeds = _jackknife(left_out_C), _variance_of_mean(_of(statistic, sums_SCK.sum(axis=1)))
        error = float(np.sqrt(by_items + by_seeds))
        seed_share = by_seeds / error**2 if 0 < error < np.inf else 0.0
        weight_C = np.abs(sums_CK[:, -1])
        clusters = _effective(weight_C)
        low, high = bca(value, left_out_C, drawn_D, _reach(self.confidence, clusters, seed_share))
        half = float(scipy_stats.t.ppf(self.confidence, clusters - 1)) * error if clusters > 1 else np.inf
        return Estimate(
            value=value, low=min(low, value - half), high=max(high, value + half), error=error,
            seed_share=seed_share, items=int((weight_C != 0).sum()), seeds=len(sums_SCK),
        )  # fmt: skip

    def shares(self, change: Floats) -> Estimate:
        """Mean of a difference of two paired shares (1, 0 or -1 an item), no narrower than Bonett and Price's interval.

        That one counts an item more in each direction (2012, J. Educ. Behav. Stat. 37). Where no item flips, the bootstrap
        sees no doubt at all, however few items there are.
        """
        found = self.estimate(ratio, change, np.ones(len(self.cluster_I)))
        total = self.clusters + 2
        up, down = ((self.clusters * float(np.mean(side)) + 1) / total for side in (change > 0, change < 0))
        error = float(np.sqrt((up + down - (up - down) ** 2) / total))
        half = float(scipy_stats.norm.ppf(self.confidence)) * error
        return found.model_copy(
            update={
                "low": min(found.low, up - down - half),
                "high": max(found.high, up - down + half),
                "error": max(found.error, error),
            }
        )

    def _sums(self, columns: Sequence[Floats]) -> Floats:
        seeds = max(np.atleast_2d(column).shape[0] for column in columns)
        sums = np.zeros((seeds, self.clusters, len(columns)))
        for k, column in enumerate(columns):
            for s, values_I in enumerate(np.broadcast_to(np.atleast_2d(column), (seeds, len(self.cluster_I)))):
                sums[s, :, k] = np.bincount(self.cluster_I, weights=values_I, minlength=self.clusters)
        return sums

    def _drawn(self, sums_SCK: Floats) -> Floats:
        """Column sums of every draw: [D, K]."""
        seeds, clusters, columns = sums_SCK.shape
        flat = sums_SCK.transpose(1, 0, 2).reshape(clusters, seeds * columns)
        totals = np.concatenate([counts_DC.astype(np.float64) @ flat for counts_DC in self._counts])
        weights_DS = seed_weights(self.draws, seeds)
        mean: Floats = np.einsum("ds,dsk->dk", weights_DS, totals.reshape(-1, seeds, columns)) / seeds
        return mean


def seed_weights(draws: int, seeds: int) -> Floats:
    """Weights [D, S] of mean one, under which a mean over seeds varies by Student's t with S - 1 degrees of freedom.

    Three seeds resampled plainly give ten different draws and two thirds of their variance: too little by far
    (docs/evaluation.md has the simulation). So they are weighted at random: normal, centred, over the root of a chi-square.
    """
    if seeds == 1:
        return np.ones((draws, 1))
    random = np.random.default_rng(1)
    normal = random.standard_normal((draws, seeds))
    centred = normal - normal.mean(axis=1, keepdims=True)
    spread = np.sqrt(random.chisquare(seeds - 1, size=(draws, 1)) / (seeds - 1))
    weights: Floats = 1 + np.sqrt(seeds / (seeds - 1)) * centred / spread
    return weights


def _of(statistic: Statistic, sums_NK: Floats) -> Floats:
    return np.asarray(statistic(*np.moveaxis(sums_NK, -1, 0)), dtype=np.float64)


def bca(value: float, left_out_C: Floats, drawn_D: Floats, reach: float) -> Interval:
    """Bias-corrected and accelerated ends (Efron & Tibshirani 1993, equations 14.10, 14.14, 14.15).

    reach: how many standard errors away an end would be, were there neither bias nor skew.
    """
    finite = np.isfinite(drawn_D)
    if not np.isfinite([value, *left_out_C]).all() or np.mean(~finite) >= scipy_stats.norm.cdf(-reach):
        return (-np.inf, np.inf)  # it is not known, or depends on a single cluster
    below = np.mean(drawn_D[finite] < value) + np.mean(drawn_D[finite] == value) / 2
    edge = 1 / (len(drawn_D) + 1)
    bias = scipy_stats.norm.ppf(np.clip(below, edge, 1 - edge))
    influence = left_out_C.mean() - left_out_C
    squares = float((influence**2).sum())
    skew = float((influence**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    z = bias + reach * np.array([-1.0, 1.0])
    # Where the correction would turn around (few, skewed clusters) the end is the outermost draw.
    low, high = scipy_stats.norm.cdf(bias + z / np.maximum(1 - skew * z, _TINY))
    bottom, top = (np.where(finite, drawn_D, end) for end in (-np.inf, np.inf))
    return (
        float(np.quantile(bottom, low, method="lower")),
        float(np.quantile(top, high, method="higher")),
    )


def _effective(weight_C: Floats) -> float:
    """How many clusters of equal weight hold as much information (Kish 1965). Unequal ones count as fewer, and those of weight
    zero, such as all outside of a slice, as none."""
    return float(weight_C.sum() ** 2 / (weight_C**2).sum()) if weight_C.any() else 0.0


def _reach(confidence: float, clusters: float, seed_share: float) -> float:
    """Standard errors out to a bound. Draws from n clusters vary by (n - 1) / n of what the clusters do, and the error is
    itself estimated: Student's t times sqrt(n / (n - 1)) makes up for both (narrowness bias; Hesterberg 2015, arXiv
    1411.5279). Draws of seeds vary as they should."""
    if clusters <= 1:
        return np.inf
    normal = float(scipy_stats.norm.ppf(confidence))
    wider = float(scipy_stats.t.ppf(confidence, clusters - 1) * np.sqrt(clusters / (clusters - 1)))
    return normal + (1 - seed_share) * (wider - normal)


def _jackknife(left_out_C: Floats) -> float:
    """Variance of a statistic from its values with one cluster left out (Efron & Tibshirani 1993, equation 11.5)."""
    count = len(left_out_C)
    if not np.isfinite(left_out_C).all():
        return float("inf")
    return float((count - 1) / count * ((left_out_C - left_out_C.mean()) ** 2).sum())


def _variance_of_mean(values: Floats) -> float:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0


def proportion(right: Floats, confidence: float, clusters: Sequence[str] | None = None) -> Estimate:
    """The share of right items (1 or 0) with Wilson's interval; each end alone is a bound at `confidence`.

    Items of a cluster may all depend on one thing, so at most the number of clusters counts.
    """
    items = len(set(clusters)) if clusters else len(right)
    share = float(np.mean(right))
    z = float(scipy_stats.norm.ppf(confidence))
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z * float(np.sqrt(share * (1 - share) / items + (z / (2 * items)) ** 2)) / (1 + z * z / items)
    # Not the error at the share itself, which is nothing where all items are right.
    return Estimate(value=share, low=middle - half, high=middle + half, error=half / z, items=items)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test: are flips in both directions equally likely? 1 without a flip."""
    return float(scipy_stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted so that a wrong finding in any of the tests is no likelier than in one (Holm 1979)."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def detectable(error: float, confidence: float) -> float:
    """The smallest true difference that a one-sided test finds with 80 % power: (z_confidence + z_0.8) x error."""
    return float((scipy_stats.norm.ppf(confidence) + scipy_stats.norm.ppf(POWER)) * error)


def times_needed(error: float, distance: float, confidence: float) -> float:
    """How many times the sample must grow for a difference of `distance` to be found with 80 % power; infinite for none."""
    return (detectable(error, confidence) / distance) ** 2 if distance > 0 else float("inf")
