"""Statistics, comparison and gates on planted models: better, equal, worse, noisy. Run: pytest tests/test_verdict.py"""

import json

import numpy as np
import pytest

from data_contracts.errors import DataError
from data_contracts.run_spec import GateSpec
from tasks.core.comparison import compare, read_samples
from tasks.core.gates import at_least, judge, overall
from tasks.core.stats import bootstrap, gain_interval, per_token, proportion_interval, retention, retention_interval

ITEMS = 300
rng = np.random.default_rng(1)
TOKENS = rng.integers(5, 40, ITEMS).astype(float)
BASE = TOKENS * rng.normal(4.3, 0.5, ITEMS)


def lowered(nats: float, noise: float = 0.05) -> np.ndarray:
    """A model whose loss lies `nats` per token below the base's."""
    return BASE - TOKENS * rng.normal(nats, noise, ITEMS)


def samples(nll, right=None):
    lines = [
        {"task": "domain_nll", "row_id": str(i), "value": value, "tokens": TOKENS[i]} for i, value in enumerate(nll)
    ]
    if right is not None:
        lines += [{"task": "domain_choice", "row_id": str(i), "value": x, "tokens": 1} for i, x in enumerate(right)]
    return read_samples(json.dumps(line) for line in lines)


def compared(candidate="qlora", **models):
    return compare({"base": samples(BASE)} | models, {}, candidate, draws=1000, confidence=0.95)


def verdicts(report):
    return {gate.name: gate.verdict for gate in report.gates}


# --- statistics ---------------------------------------------------------------------------------------------


def test_loss_per_token_weighs_items_by_their_tokens():
    assert per_token(np.array([2.0, 9.0]), np.array([1.0, 3.0])) == pytest.approx(11 / 4)


def test_the_bootstrap_of_a_mean_agrees_with_its_standard_error():
    values = rng.normal(10, 2, 400)
    low, high = bootstrap(lambda total, n: total / n, [values, np.ones(400)], draws=4000, confidence=0.95)
    error = values.std(ddof=1) / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.03)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.03)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        values = draw.exponential(1.0, 80)
        low, high = bootstrap(lambda total, n: total / n, [values, np.ones(80)], draws=400, confidence=0.9)
        hits += low <= 1.0 <= high
    assert 0.82 <= hits / 200 <= 0.96


def test_pairing_removes_what_the_items_have_in_common():
    low, high = gain_interval(BASE, lowered(0.1), TOKENS, 1000, 0.95)
    spread = bootstrap(lambda total, n: total / n, [BASE, TOKENS], draws=1000, confidence=0.95)
    assert (high - low) < (spread[1] - spread[0]) / 3


def test_retention_is_the_share_of_the_gain():
    assert retention(np.array([10.0]), np.array([7.0]), np.array([6.0])) == pytest.approx(0.75)


def test_retention_without_a_gain_is_unknown_not_infinite():
    same = BASE.copy()
    assert np.isnan(retention(BASE, BASE - 1, same))
    assert retention_interval(BASE, BASE - 1, same, draws=200, confidence=0.95) == (-np.inf, np.inf)


def test_wilson_interval_agrees_with_its_formula():
    low, high = proportion_interval(60, 100, 0.95)
    z, p, n = 1.959964, 0.6, 100
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (low, high) == (pytest.approx(middle - half, abs=1e-5), pytest.approx(middle + half, abs=1e-5))


# --- gates on planted models --------------------------------------------------------------------------------


def test_a_candidate_that_keeps_the_gain_passes():
    report = judge(compared(lora=samples(lowered(1.5)), qlora=samples(lowered(1.45))), GateSpec(), None)
    assert report.verdict == "pass"


def test_a_candidate_that_loses_the_gain_fails():
    report = judge(compared(lora=samples(lowered(1.5)), qlora=samples(lowered(1.0))), GateSpec(), None)
    assert verdicts(report)["qlora_keeps_loras_gain"] == "fail"
    assert report.verdict == "fail"


def test_a_candidate_on_the_margin_is_inconclusive():
    report = judge(compared(lora=samples(lowered(1.5, 0.6)), qlora=samples(lowered(1.425, 0.6))), GateSpec(), None)
    assert verdicts(report)["qlora_keeps_loras_gain"] == "inconclusive"
    assert report.verdict == "inconclusive"


def test_a_candidate_worse_than_base_fails():
    report = judge(compared(lora=samples(lowered(1.5)), qlora=samples(lowered(-0.5))), GateSpec(), None)
    assert verdicts(report)["qlora_beats_base"] == "fail"


def test_models_equal_to_base_do_not_pass():
    report = judge(compared(lora=samples(BASE), qlora=samples(BASE)), GateSpec(), None)
    assert verdicts(report)["lora_beats_base"] == "inconclusive"
    assert report.verdict == "fail"  # the retention of no gain is a missing number


@pytest.mark.parametrize(("champion", "verdict"), [(1.0, "pass"), (2.0, "fail")])
def test_the_champion_must_not_be_beaten_down(champion, verdict):
    arms = {"lora": samples(lowered(1.5)), "qlora": samples(lowered(1.5)), "champion": samples(lowered(champion))}
    report = judge(compared(**arms), GateSpec(), "NAME version 1")
    assert verdicts(report)["not_worse_than_champion"] == verdict


def test_a_champion_without_numbers_fails_the_gate():
    arms = {"lora": samples(lowered(1.5)), "qlora": samples(lowered(1.5))}
    report = judge(compared(**arms), GateSpec(), "NAME version 1")
    assert verdicts(report)["not_worse_than_champion"] == "fail"


def test_without_a_lora_arm_the_retention_is_missing_and_fails():
    report = judge(compared(qlora=samples(lowered(1.5))), GateSpec(), None)
    assert verdicts(report)["qlora_keeps_loras_gain"] == "fail"
    assert verdicts(report)["lora_beats_base"] == "fail"


def test_an_accuracy_margin_is_a_gate_only_if_it_is_set():
    right = (rng.random(ITEMS) < 0.6).astype(float)
    worse = right * (rng.random(ITEMS) < 0.7)
    arms = {"lora": samples(lowered(1.5), right), "qlora": samples(lowered(1.5), worse)}
    models = {"base": samples(BASE, right), **arms}
    comparison = compare(models, {}, "qlora", draws=1000, confidence=0.95)
    assert "qlora_keeps_accuracy" not in verdicts(judge(comparison, GateSpec(), None))
    assert verdicts(judge(comparison, GateSpec(max_accuracy_drop=0.05), None))["qlora_keeps_accuracy"] == "fail"
    assert verdicts(judge(comparison, GateSpec(max_accuracy_drop=0.5), None))["qlora_keeps_accuracy"] == "pass"


def test_models_scored_on_other_items_are_not_compared():
    other = read_samples([json.dumps({"task": "domain_nll", "row_id": "x", "value": 1.0, "tokens": 1})])
    with pytest.raises(DataError, match="different items"):
        compared(lora=other)


def test_a_missing_number_never_passes():
    assert at_least("gate", 0.0, None, None, "claim").verdict == "fail"
    assert at_least("gate", 0.0, float("nan"), (1.0, 2.0), "claim").verdict == "fail"
    assert at_least("gate", 0.0, 1.0, None, "claim").verdict == "fail"


def test_no_gates_at_all_fail():
    assert overall([]) == "fail"
    assert overall(["pass", "inconclusive"]) == "inconclusive"
    assert overall(["pass", "inconclusive", "fail"]) == "fail"


def test_a_claim_is_confirmed_denied_or_left_open_by_the_interval():
    kept = compared(lora=samples(lowered(1.5, 0.01)), qlora=samples(lowered(1.5, 0.01))).claims[0]
    lost = compared(lora=samples(lowered(1.5, 0.01)), qlora=samples(lowered(1.2, 0.01))).claims[0]
    assert "holds on this run" in kept
    assert "does not hold on this run" in lost
