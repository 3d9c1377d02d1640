"""Gates: may this candidate be released? Each answers pass, fail or inconclusive, and says why.

A gate passes only if its whole interval clears the threshold, fails only if the whole interval misses it, and is
inconclusive in between. A missing number fails.
"""

import math
from collections.abc import Sequence

from data_contracts.reports import Comparison, GateReport, GateResult, Interval, Verdict
from data_contracts.run_spec import GateSpec


def at_least(name: str, threshold: float, actual: float | None, interval: Interval | None, claim: str) -> GateResult:
    """Pass if the interval lies at or above the threshold."""
    verdict, why = _judge(threshold, actual, interval)
    return GateResult(
        name=name, threshold=threshold, actual=actual, interval=interval, verdict=verdict, why=f"{claim}: {why}"
    )


def _judge(threshold: float, actual: float | None, interval: Interval | None) -> tuple[Verdict, str]:
    if actual is None or interval is None or math.isnan(actual):
        return "fail", "the number is missing, and a missing number never passes"
    low, high = interval
    if low >= threshold:
        return "pass", f"the whole interval is at or above {threshold:g}"
    if high < threshold:
        return "fail", f"the whole interval is below {threshold:g}"
    return "inconclusive", f"the interval holds {threshold:g}: more test rows or another seed would decide"


def judge(comparison: Comparison, spec: GateSpec, champion: str | None, has_baseline: bool = True) -> GateReport:
    """All gates of a run.

    champion: what is in production now ("NAME version N"), or None. has_baseline: whether a LoRA arm was trained beside
    the candidate; a registered version that is evaluated alone has none, and its gates are fewer.
    """
    candidate = comparison.candidate
    gates = [_gain(comparison, candidate, "the candidate is better than the untuned base")]
    if has_baseline:
        gates.insert(0, _gain(comparison, "lora", "LoRA learns from these data, or a comparison with it says nothing"))
        claim = "share of LoRA's loss gain that QLoRA keeps"
        kept, interval = comparison.retention, comparison.retention_ci95
        gates.append(at_least("qlora_keeps_loras_gain", spec.min_retention, kept, interval, claim))
    if has_baseline and spec.max_accuracy_drop is not None:
        gates.append(_accuracy(comparison, spec.max_accuracy_drop))
    gates.append(_champion(comparison, spec.max_champion_nll_increase_nats, champion))
    return GateReport(gates=gates, verdict=overall([gate.verdict for gate in gates]))


def _gain(comparison: Comparison, arm: str, claim: str) -> GateResult:
    nll, interval = comparison.nll_nats, comparison.nll_gain_ci95.get(arm)
    actual = nll["base"] - nll[arm] if "base" in nll and arm in nll else None
    result = at_least(f"{arm}_beats_base", 0.0, actual, interval, claim)
    if result.verdict == "pass" and interval is not None and interval[0] <= 0.0:
        # "Better" is strict: an interval that touches zero has not excluded "no gain".
        return result.model_copy(update={"verdict": "inconclusive", "why": f"{claim}: the interval touches zero"})
    return result


def _accuracy(comparison: Comparison, margin: float) -> GateResult:
    drop, interval = comparison.accuracy_drop, comparison.accuracy_drop_ci95
    return at_least(
        "qlora_keeps_accuracy", -margin, None if drop is None else -drop,
        None if interval is None else (-interval[1], -interval[0]),
        "QLoRA's accuracy minus LoRA's",
    )  # fmt: skip


def _champion(comparison: Comparison, margin: float, champion: str | None) -> GateResult:
    name = "not_worse_than_champion"
    if champion is None:
        why = "first-run rule: no other version is in production, so beating the base decides"
        return GateResult(name=name, threshold=None, actual=None, interval=None, verdict="pass", why=why)
    nll, interval = comparison.nll_nats, comparison.nll_gain_ci95.get("champion")
    candidate = comparison.candidate
    actual = nll["champion"] - nll[candidate] if "champion" in nll and candidate in nll else None
    return at_least(name, -margin, actual, interval, f"loss of {champion} minus the candidate's, nats per token")


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """fail if any gate fails, else inconclusive if any is, else pass. No gates at all fail."""
    if not verdicts or "fail" in verdicts:
        return "fail"
    return "inconclusive" if "inconclusive" in verdicts else "pass"
