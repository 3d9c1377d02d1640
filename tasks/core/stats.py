"""Paired statistics: every interval resamples the items that two models both answered.

Percentile bootstrap over items (Efron & Tibshirani 1993, chapter 13). Arrays: I items; nll_I is the summed loss of an
item's completion in nats, tokens_I its number of completion tokens.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

Floats = NDArray[np.float64]
Interval = tuple[float, float]
_DRAWS_AT_ONCE = 500  # keeps the resampling matrix small


def per_token(nll_I: Floats, tokens_I: Floats) -> float:
    """Mean loss per completion token, in nats: sum of losses over sum of tokens."""
    return float(nll_I.sum() / tokens_I.sum())


def bootstrap(
    statistic: Callable[..., Floats], columns: list[Floats], draws: int, confidence: float, seed: int = 0
) -> Interval:
    """Percentile interval of a statistic of column sums over items resampled together, so pairs stay pairs.

    statistic: takes one array of D column sums per column and returns D values. NaN values (a ratio over zero) widen
    the interval to infinity on both sides rather than vanish.
    """
    matrix_IC = np.stack(columns, axis=1)
    items = len(matrix_IC)
    rng = np.random.default_rng(seed)
    values = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        counts_DI = rng.multinomial(items, np.full(items, 1 / items), size=min(_DRAWS_AT_ONCE, draws - start))
        sums_DC = counts_DI @ matrix_IC
        values.append(statistic(*sums_DC.T))
    drawn = np.concatenate(values)
    if not np.isfinite(drawn).all():
        return (-np.inf, np.inf)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return (float(low), float(high))


def gain_interval(before_I: Floats, after_I: Floats, weight_I: Floats, draws: int, confidence: float) -> Interval:
    """Interval of sum(before - after) / sum(weight): the gain per token (or per item, with weights of one)."""
    return bootstrap(lambda gain, weight: gain / weight, [before_I - after_I, weight_I], draws, confidence)


def retention(base_I: Floats, qlora_I: Floats, lora_I: Floats) -> float:
    """(loss of base - loss of QLoRA) / (loss of base - loss of LoRA); token counts cancel. NaN if LoRA gained nothing."""
    gained = float((base_I - lora_I).sum())
    return float((base_I - qlora_I).sum()) / gained if gained > 0 else float("nan")


def retention_interval(base_I: Floats, qlora_I: Floats, lora_I: Floats, *, draws: int, confidence: float) -> Interval:
    """Paired bootstrap interval of `retention`; unbounded if LoRA's gain is not above zero in every draw."""

    def ratio(kept: Floats, gained: Floats) -> Floats:
        return np.divide(kept, gained, out=np.full_like(kept, np.nan), where=gained > 0)

    return bootstrap(ratio, [base_I - qlora_I, base_I - lora_I], draws, confidence)


def proportion_interval(successes: int, items: int, confidence: float) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927), through SciPy."""
    interval = scipy_stats.binomtest(successes, items).proportion_ci(confidence, method="wilson")
    return (float(interval.low), float(interval.high))
