"""Which form to merge into: what rounding leaves of what was learned, and the choice among forms that were measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_contracts.exports import FormMeasured, Survival

_TIE = 10
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Rounding:
    """Sums over weights, so that tensors add up."""

    error: float = 0.0  # squares of stored - exact
    learned: float = 0.0  # squares of exact - before
    weights: int = 0
    unchanged: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(
            self.error + other.error,
            self.learned + other.learned,
            self.weights + other.weights,
            self.unchanged + other.unchanged,
        )

    def survival(self) -> Survival:
        """Of nothing learned nothing can be lost: 1."""
        lost = math.sqrt(self.error / self.learned) if self.learned else 0.0
        return Survival(survival=1 - lost, unchanged=self.unchanged / self.weights if self.weights else 0.0)


def rounding(before: Numbers, exact: Numbers, stored: Numbers, stored_before: Numbers) -> Rounding:
    """One tensor before and after the adapter is added, and both as they are stored."""
    error = (stored.astype(np.float64) - exact) ** 2
    learned = (exact.astype(np.float64) - before) ** 2
    return Rounding(float(error.sum()), float(learned.sum()), exact.size, int((stored == stored_before).sum()))


def choose_form(forms: Sequence[FormMeasured], tolerance_nats: float) -> FormMeasured | None:
    """The form nearest to the live model, if it is within the tolerance; what is not a number is not.

    Distances that differ by less than a tenth of the tolerance are a tie: the smallest file wins it, then the smallest
    distance.
    """
    within = [form for form in forms if form.distance.kl_nats <= tolerance_nats]
    if not within:
        return None
    nearest = min(form.distance.kl_nats for form in within)
    tied = [form for form in within if form.distance.kl_nats <= nearest + tolerance_nats / _TIE]
    return min(tied, key=lambda form: (form.bytes, form.distance.kl_nats))


def partial_kl(log_live_K: Numbers, log_form_K: Numbers) -> float:
    """KL in nats over K tokens of a distribution and all others as one: never more than over all of them.

    https://en.wikipedia.org/wiki/Log_sum_inequality
    """
    live, form = np.exp(log_live_K.astype(np.float64)), np.exp(log_form_K.astype(np.float64))
    rest_live, rest_form = max(0.0, 1 - live.sum()), max(1e-12, 1 - form.sum())
    rest = rest_live * math.log(rest_live / rest_form) if rest_live > 0 else 0.0
    return float((live * (log_live_K.astype(np.float64) - log_form_K)).sum()) + rest
