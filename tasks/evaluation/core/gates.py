"""Gates: may this candidate be released? Each is a setting of the spec and answers pass, fail or inconclusive, and says why.

A gate passes only if its whole interval clears the threshold, fails only if the whole interval misses it, and is
inconclusive in between. A missing number fails. All gates must pass, so none needs a correction for the others.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from scipy import stats as scipy_stats

from data_contracts.run_spec import GateSpec
from data_contracts.verdict import Comparison, Estimate, GateReport, GateResult, Served, SliceGain, Verdict
from tasks.evaluation.core.stats import holm, times_needed

Direction = Literal["at least", "more than", "at most"]


def judge(
    found: Comparison,
    settings: GateSpec,
    champion: str | None,
    *,
    has_baseline: bool = True,
    served: Served | None = None,
) -> GateReport:
    """All gates of a run.

    champion: what is in production now ("NAME version N"), or None. has_baseline: whether a LoRA arm was trained with
    the candidate. A registered version that is evaluated alone has none, and fewer gates.
    """
    gates: list[GateResult] = []
    off: list[str] = []
    for setting, gate in _GATES.items():
        threshold = getattr(settings, setting)
        if threshold is None:
            off.append(f"{setting} is null")
        elif setting in _OF_THE_METHOD and not has_baseline:
            off.append(f"{setting}: no LoRA arm was trained with this version")
        else:
            gates += gate(_Case(found, settings, champion, served), threshold)
    return GateReport(gates=gates, off=off, verdict=overall([gate.verdict for gate in gates]))


class _Case(NamedTuple):
    """What a gate may use."""

    found: Comparison
    settings: GateSpec
    champion: str | None
    served: Served | None

    def result(
        self, name: str, direction: Direction, threshold: float, actual: Estimate | None, claim: str
    ) -> GateResult:
        verdict, why = interval_verdict(direction, threshold, actual)
        if verdict == "inconclusive" and actual:
            why += more_needed(actual, threshold, self.settings.confidence)
        return GateResult(
            name=name, direction=direction, threshold=threshold, actual=actual.value if actual else None,
            interval=actual.interval if actual else None, verdict=verdict, why=f"{claim}: {why}",
        )  # fmt: skip


def interval_verdict(direction: Direction, threshold: float, actual: Estimate | None) -> tuple[Verdict, str]:
    """pass or fail if the whole interval says so, else inconclusive; and why."""
    if actual is None or not math.isfinite(actual.value):
        return "fail", "the number is missing, and a missing number never passes"
    low, high = actual.interval
    sides = {
        "at least": (low >= threshold, high < threshold),
        "more than": (low > threshold, high <= threshold),
        "at most": (high <= threshold, low > threshold),
    }
    passes, fails = sides[direction]
    if passes:
        return "pass", f"the whole interval is {direction} {threshold:g}"
    if fails:
        return "fail", f"the whole interval is not {direction} {threshold:g}"
    return "inconclusive", f"the interval holds {threshold:g}"


def more_needed(actual: Estimate, threshold: float, confidence: float) -> str:
    """How much larger the sample must be to decide, with 80 % power, if the truth is what was measured."""
    items, seeds = actual.items, actual.seeds
    distance = abs(actual.value - threshold)
    times = times_needed(actual.error, distance, confidence)
    if distance > 0:  # an interval may be wider than its error says, and must shrink until it clears the threshold
        reach = actual.value - actual.low if actual.value > threshold else actual.high - actual.value
        times = max(times, (reach / distance) ** 2)
    if not math.isfinite(times) or times * items > 1e7:
        return "; the value is on the threshold, and no number of items would decide"
    # More items leave what seeds differ by as it is, and the other way round.
    if actual.seed_share > 0.5:
        return f"; if it is as measured, about {max(seeds + 1, math.ceil(seeds * times))} seeds decide it (now {seeds})"
    return f"; if it is as measured, about {max(items + 1, math.ceil(items * times)):,} items decide it (now {items:,})"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """fail if any gate fails, else inconclusive if any is, else pass. No gates at all fail."""
    if not verdicts or "fail" in verdicts:
        return "fail"
    return "inconclusive" if "inconclusive" in verdicts else "pass"


# --- the gates, in the order of the report ------------------------------------------------------------------


def _lora_gain(case: _Case, threshold: float) -> Iterator[GateResult]:
    claim = "LoRA learns from these data, or a comparison with it says nothing"
    yield case.result("lora_beats_base", "more than", threshold, case.found.gains.get("lora"), claim)


def _retention(case: _Case, threshold: float) -> Iterator[GateResult]:
    claim = "share of LoRA's loss gain that QLoRA keeps"
    yield case.result("qlora_keeps_loras_gain", "at least", threshold, case.found.retention, claim)


def _accuracy(case: _Case, threshold: float) -> Iterator[GateResult]:
    claim = "LoRA's accuracy minus QLoRA's"
    yield case.result("qlora_keeps_accuracy", "at most", threshold, case.found.accuracy_drop, claim)


def _gain(case: _Case, threshold: float) -> Iterator[GateResult]:
    claim = "loss of the untuned base minus the candidate's, nats per token"
    yield case.result("candidate_beats_base", "more than", threshold, case.found.gain, claim)


def _champion(case: _Case, threshold: float) -> Iterator[GateResult]:
    name = "not_worse_than_champion"
    if case.champion is None:
        why = "first-run rule: no other version is in production, so beating the base decides"
        yield GateResult(name=name, direction="", threshold=None, actual=None, interval=None, verdict="pass", why=why)
        return
    gain = case.found.champion_gain
    claim = f"the candidate's loss minus that of {case.champion}, nats per token"
    yield case.result(name, "at most", threshold, gain and negated(gain), claim)


def _forgetting_nats(case: _Case, threshold: float) -> Iterator[GateResult]:
    losses = [change for change in case.found.general if change.metric == "nll_nats"]
    claim = "loss on general text above the base's, nats per token"
    yield case.result("keeps_general_text", "at most", threshold, negated(losses[0].change) if losses else None, claim)


def _forgetting_accuracy(case: _Case, threshold: float) -> Iterator[GateResult]:
    tasks = [change for change in case.found.general if change.metric != "nll_nats"]
    if not tasks:
        yield case.result(
            "keeps_general_knowledge", "at most", threshold, actual=None, claim="accuracy below the base's"
        )
    for change in tasks:
        claim = f"accuracy in {change.task} below the base's"
        yield case.result(f"keeps_{change.task}", "at most", threshold, negated(change.change), claim)


def _slices(case: _Case, threshold: float) -> Iterator[GateResult]:
    """No slice may be below the threshold. Each is tested, and Holm's method separates harm from chance."""
    name, claim = "every_slice_gains", "loss of the base minus the candidate's in the worst slice"
    large = [item for item in case.found.slices if item.items >= case.settings.min_slice_items]
    if not large:
        claim = f"no slice has {case.settings.min_slice_items} items or more, so all items are one slice"
        yield case.result(name, "more than", threshold, case.found.gain, claim)
        return
    below = holm({_label(item): _p_below(item.gain, threshold) for item in large})
    worst = min(large, key=lambda item: (item.gain.low, _label(item)))
    claim = f"{claim}, {_label(worst)} ({worst.items} items)"
    alpha = 1 - case.settings.confidence
    verdict: Verdict = "inconclusive"
    if missing := [_label(item) for item in large if not math.isfinite(item.gain.value)]:
        verdict, why = "fail", f"the number is missing in {', '.join(missing)}, and a missing number never passes"
    elif all(item.gain.low > threshold for item in large):
        verdict, why = "pass", f"the whole interval is more than {threshold:g}, as in all {len(large)} slices tested"
    elif harmed := [label for label, p in below.items() if p < alpha]:
        verdict, why = "fail", f"below {threshold:g} in {', '.join(sorted(harmed))}, beyond chance"
    else:
        why = f"its interval holds {threshold:g}, and no slice is below beyond chance"
        why += more_needed(worst.gain.model_copy(update={"items": worst.items}), threshold, case.settings.confidence)
    yield GateResult(
        name=name, direction="more than", threshold=threshold, actual=worst.gain.value, interval=worst.gain.interval,
        verdict=verdict, why=f"{claim}: {why}",
    )  # fmt: skip


def _label(item: SliceGain) -> str:
    return f"{item.kind} {item.name}"


def _p_below(gain: Estimate, threshold: float) -> float:
    """One-sided p of a gain as low as this if the truth were the threshold."""
    if gain.error == 0:
        return float(gain.value > threshold)
    return float(scipy_stats.norm.cdf((gain.value - threshold) / gain.error))


def _stops(case: _Case, threshold: float) -> Iterator[GateResult]:
    claim = "share of answers that the candidate ends with a stop token"
    yield case.result("candidate_stops", "at least", threshold, case.found.stop_rate, claim)


def _latency(case: _Case, threshold: float) -> Iterator[GateResult]:
    measured = case.served.ms_per_token if case.served else None
    yield case.result("fast_enough", "at most", threshold, _exact(measured), "milliseconds per written token")


def _memory(case: _Case, threshold: float) -> Iterator[GateResult]:
    measured = case.served.peak_bytes / 1e9 if case.served else None
    yield case.result(
        "small_enough", "at most", threshold, _exact(measured), "GB of a process that serves the candidate"
    )


def _exact(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value=value, low=value, high=value, error=0.0)


def negated(found: Estimate) -> Estimate:
    return found.model_copy(update={"value": 0.0 - found.value, "low": 0.0 - found.high, "high": 0.0 - found.low})


_GATES: dict[str, Callable[[_Case, float], Iterator[GateResult]]] = {
    "min_lora_gain_nats": _lora_gain,
    "min_retention": _retention,
    "max_accuracy_drop": _accuracy,
    "min_gain_nats": _gain,
    "max_champion_nll_increase_nats": _champion,
    "max_forgetting_nats": _forgetting_nats,
    "max_forgetting_accuracy": _forgetting_accuracy,
    "min_slice_gain_nats": _slices,
    "min_stop_rate": _stops,
    "max_ms_per_token": _latency,
    "max_memory_gb": _memory,
}
_OF_THE_METHOD = ("min_lora_gain_nats", "min_retention", "max_accuracy_drop")
