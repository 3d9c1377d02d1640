"""Comparison and gates on planted numbers: better, equal, worse, noisy, missing. Run: pytest tests/evaluation/test_verdict.py"""

import json
import math
import re

import numpy as np
import pytest
from pydantic import ValidationError

from data_contracts.errors import DataError
from data_contracts.run_spec import GateSpec, RunSpec
from data_contracts.verdict import Comparison, Estimate, Served
from tasks.evaluation.core.comparison import compare_arms
from tasks.evaluation.core.gates import interval_verdict, judge, more_needed, overall
from tasks.evaluation.core.samples import Fact, read_samples
from tasks.evaluation.core.stats import proportion
from tasks.reporting.sentences import sentences
from tests.support.verdicts import SETTINGS, trained

ITEMS = 300
rng = np.random.default_rng(1)
TOKENS = rng.integers(5, 40, ITEMS).astype(float)
BASE = TOKENS * rng.normal(4.3, 0.5, ITEMS)
FACTS = {
    str(i): Fact(str(i), str(i), 4 * int(TOKENS[i]), f"file{i % 2}", "en", "up to 64 tokens" if i % 3 else "over 1,024")
    for i in range(ITEMS)
}


def lowered(nats, noise=0.05, items=ITEMS):
    """A model whose loss is `nats` per token below the base's."""
    return BASE - TOKENS * rng.normal(nats, noise, items)


def line(task, metric, i, value, tokens=1):
    return {"task": task, "metric": metric, "row_id": str(i), "value": value, "tokens": tokens}


def samples(nll, right=None, stopped=None, general=None):
    lines = [line("domain_nll", "nll_nats", i, value, TOKENS[i]) for i, value in enumerate(nll)]
    lines += [line("domain_choice", "accuracy", i, x) for i, x in enumerate(() if right is None else right)]
    lines += [line("domain_generate", "stopped", i, x) for i, x in enumerate(() if stopped is None else stopped)]
    for (task, metric), values in (general or {}).items():
        lines += [line(task, metric, i, x) for i, x in enumerate(values)]
    return read_samples(json.dumps(item) for item in lines)


def compared(arms=None, settings=SETTINGS, released="qlora", **models):
    """Arms are named as the models are, unless they are given."""
    names = [name for name in models if name in ("lora", "qlora")]
    arms = arms if arms is not None else [trained(name) for name in names]
    return compare_arms({"base": samples(BASE)} | models, FACTS, arms, "qlora", released, settings)


def verdicts(found, settings=SETTINGS, champion=None, **more):
    report = judge(found, settings, champion, **more)
    return {gate.name: gate.verdict for gate in report.gates} | {"all": report.verdict}


# --- what is compared ---------------------------------------------------------------------------------------


def test_a_loss_per_token_weighs_items_by_their_tokens_and_bits_are_of_bytes():
    found = compared(qlora=samples(lowered(1.0)))
    assert found.nll_nats["base"] == pytest.approx(BASE.sum() / TOKENS.sum())
    assert found.bits_per_byte["base"] == pytest.approx(BASE.sum() / math.log(2) / (4 * TOKENS.sum()))


def test_an_arm_is_compared_over_its_seeds_and_the_released_adapter_alone():
    arms = [trained(f"{arm}-{seed}", arm, seed) for arm in ("lora", "qlora") for seed in (1, 2, 3)]
    models = {f"lora-{seed}": samples(lowered(1.5)) for seed in (1, 2, 3)}
    models |= {f"qlora-{seed}": samples(lowered(nats)) for seed, nats in ((1, 1.5), (2, 1.4), (3, 1.3))}
    found = compared(arms, released="qlora-1", **models)
    assert found.seeds == 3
    assert found.gains["qlora"].value == pytest.approx(1.4, abs=0.02)
    assert found.gain.value == pytest.approx(1.5, abs=0.02)
    assert found.seed_sd["qlora"] == pytest.approx(0.1, abs=0.02)
    assert found.gains["qlora"].seed_share > 0.9
    assert found.retention.interval[0] < 0.85  # three seeds that differ so much prove little


def test_retention_is_the_share_of_the_gain():
    found = compared(lora=samples(BASE - 2 * TOKENS), qlora=samples(BASE - 1.5 * TOKENS))
    assert found.retention.value == pytest.approx(0.75)


def test_retention_without_a_gain_is_unknown_not_infinite():
    found = compared(lora=samples(BASE), qlora=samples(lowered(1.0)))
    assert math.isnan(found.retention.value)
    assert found.retention.interval == (-math.inf, math.inf)


def test_an_unbounded_interval_survives_the_report_as_json():
    found = compared(lora=samples(BASE), qlora=samples(lowered(1.0)))
    again = Comparison.model_validate_json(found.model_dump_json())
    assert again.retention.interval == (-math.inf, math.inf)
    assert json.loads(found.model_dump_json())  # and it is JSON that any reader takes


def test_slices_differ_by_source_and_length_but_not_by_what_all_share():
    hurt = lowered(1.0)
    hurt[::2] = BASE[::2] + TOKENS[::2]
    found = compared(qlora=samples(hurt))
    gains = {(item.kind, item.name): item for item in found.slices}
    assert {kind for kind, _ in gains} == {"source", "length"}
    assert gains["source", "file0"].gain.value == pytest.approx(-1.0, abs=0.01)
    assert gains["source", "file1"].gain.value == pytest.approx(1.0, abs=0.02)
    assert sum(item.items for item in found.slices if item.kind == "source") == ITEMS


def test_flips_and_their_exact_test_come_from_the_same_items():
    right = (rng.random(ITEMS) < 0.6).astype(float)
    worse = right.copy()
    worse[np.flatnonzero(right)[:20]] = 0
    worse[np.flatnonzero(right == 0)[:5]] = 1
    found = compared(lora=samples(lowered(1), right), qlora=samples(lowered(1), worse))
    assert (found.flips.lost, found.flips.won) == (20, 5)
    assert found.accuracy_drop.value == pytest.approx(15 / ITEMS)


def test_tasks_beyond_the_domain_are_compared_with_the_base_and_corrected_for_their_number():
    right = np.arange(200) % 2 == 0
    worse = right.copy()
    worse[:20] = False
    text = {("general_nll", "nll_nats"): np.full(50, 3.0)}
    base = samples(BASE, general={("general_piqa", "accuracy"): right.astype(float), **text})
    text = {("general_nll", "nll_nats"): np.full(50, 3.2)}
    own = samples(lowered(1), general={("general_piqa", "accuracy"): worse.astype(float), **text})
    found = compared(base=base, qlora=own)
    by_task = {change.task: change for change in found.general}
    assert by_task["general_piqa"].change.value == pytest.approx(-0.05)
    assert by_task["general_piqa"].p == pytest.approx(2 / 2**10)
    assert by_task["general_nll"].change.value == pytest.approx(-0.2)
    assert by_task["general_nll"].p is None


def test_another_form_of_the_adapter_is_held_against_the_form_it_was_trained_on():
    own = lowered(1.0)
    found = compared(qlora=samples(own), **{"qlora-on-full": samples(own - 0.1 * TOKENS)})
    assert found.forms["full"].value == pytest.approx(-0.1)
    assert "qlora-on-full" not in found.gains


def test_speed_is_paired_by_step_and_memory_by_seed():
    found = compared([trained("lora", seconds=1.0), trained("qlora", seconds=1.25, peak=10**9)])
    assert found.speed_ratio.value == pytest.approx(1.01 / 1.26, abs=0.01)
    assert found.memory_saving.value == pytest.approx(0.5)
    assert found.weights_saving == pytest.approx(0.9)


def test_models_scored_on_other_items_are_not_compared():
    other = read_samples([json.dumps(line("domain_nll", "nll_nats", "x", 1.0))])
    with pytest.raises(DataError, match="different items"):
        compared(lora=other)


# --- claims -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nats", "verdict"), [(1.5, "holds"), (1.2, "does not hold"), (1.485, "cannot tell")])
def test_a_claim_is_confirmed_denied_or_left_open_by_the_interval(nats, verdict):
    noise = 0.3 if verdict == "cannot tell" else 0.01
    found = compared(lora=samples(lowered(1.5, noise)), qlora=samples(lowered(nats, noise)))
    assert next(claim for claim in found.claims if "99 %" in claim.claim).verdict == verdict


def test_what_was_not_measured_is_no_claim():
    assert compared(qlora=samples(lowered(1))).claims == []
    found = compared([], lora=samples(lowered(1)), qlora=samples(lowered(1)))
    assert found.claims == []


# --- gates on planted models --------------------------------------------------------------------------------


def test_a_candidate_that_keeps_the_gain_passes():
    found = compared(lora=samples(lowered(1.5)), qlora=samples(lowered(1.45)))
    assert set(verdicts(found).values()) == {"pass"}


def test_a_candidate_that_loses_the_gain_fails():
    found = compared(lora=samples(lowered(1.5)), qlora=samples(lowered(1.0)))
    assert verdicts(found)["qlora_keeps_loras_gain"] == "fail"
    assert verdicts(found)["all"] == "fail"


def test_a_candidate_on_the_margin_is_inconclusive_and_why_says_what_would_decide():
    found = compared(lora=samples(lowered(1.5, 0.6)), qlora=samples(lowered(1.435, 0.6)))
    gate = next(gate for gate in judge(found, SETTINGS, None).gates if gate.name == "qlora_keeps_loras_gain")
    assert gate.verdict == "inconclusive"
    assert "items decide it (now 300)" in gate.why or "no number of items" in gate.why


def test_a_candidate_worse_than_base_fails():
    found = compared(lora=samples(lowered(1.5)), qlora=samples(lowered(-0.5)))
    assert verdicts(found)["candidate_beats_base"] == "fail"


def test_a_candidate_that_is_the_base_fails():
    found = compared(lora=samples(lowered(1.5)), qlora=samples(BASE))
    assert verdicts(found)["candidate_beats_base"] == "fail"


def test_where_lora_learns_nothing_the_comparison_says_nothing():
    found = compared(lora=samples(lowered(0.0)), qlora=samples(lowered(1.0)))
    assert verdicts(found)["lora_beats_base"] in ("fail", "inconclusive")
    assert verdicts(found)["all"] != "pass"


@pytest.mark.parametrize(("champion", "verdict"), [(1.0, "pass"), (1.5, "pass"), (2.0, "fail")])
def test_the_champion_must_not_be_beaten_down(champion, verdict):
    arms = {"lora": samples(lowered(1.5)), "qlora": samples(lowered(1.5)), "champion": samples(lowered(champion))}
    assert verdicts(compared(**arms), champion="NAME version 1")["not_worse_than_champion"] == verdict


def test_a_champion_without_numbers_fails_the_gate_and_none_at_all_passes():
    arms = {"lora": samples(lowered(1.5)), "qlora": samples(lowered(1.5))}
    assert verdicts(compared(**arms), champion="NAME version 1")["not_worse_than_champion"] == "fail"
    assert verdicts(compared(**arms))["not_worse_than_champion"] == "pass"


def test_without_a_lora_arm_the_retention_is_missing_and_fails():
    found = verdicts(compared(qlora=samples(lowered(1.5))))
    assert found["qlora_keeps_loras_gain"] == "fail"
    assert found["lora_beats_base"] == "fail"


def test_one_bad_slice_fails_a_candidate_that_is_good_on_the_whole():
    hurt = lowered(2.0)
    hurt[::3] = BASE[::3] + TOKENS[::3] * rng.normal(0.5, 0.1, 100)
    found = compared(lora=samples(lowered(2.0)), qlora=samples(hurt))
    assert verdicts(found)["candidate_beats_base"] == "pass"
    assert verdicts(found)["every_slice_gains"] == "fail"


def test_a_slice_of_few_items_is_shown_and_not_tested():
    hurt = lowered(2.0)
    hurt[::3] = BASE[::3] + 0.5 * TOKENS[::3]
    settings = SETTINGS.model_copy(update={"min_slice_items": 120})
    assert verdicts(compared(settings=settings, qlora=samples(hurt)), settings)["every_slice_gains"] == "pass"


def test_a_slice_is_tested_however_many_there_are():
    facts = {row: Fact(row, row, 9, f"source {int(row) // 12:02}", "en", "short") for row in FACTS}
    hurt = lowered(2.0)
    hurt[288:] = BASE[288:] + TOKENS[288:] * rng.normal(0.5, 0.1, 12)
    settings = SETTINGS.model_copy(update={"min_slice_items": 12})
    found = compare_arms(
        {"base": samples(BASE), "qlora": samples(hurt)}, facts, [trained("qlora")], "qlora", "qlora", settings
    )
    assert len(found.slices) == 25
    assert verdicts(found, settings)["every_slice_gains"] == "fail"


def test_a_slice_whose_number_is_missing_fails():
    broken = lowered(2.0)
    broken[0] = math.nan
    alone = SETTINGS.model_copy(update={"min_gain_nats": None, "max_champion_nll_increase_nats": None})
    report = judge(compared(qlora=samples(broken)), alone, None, has_baseline=False)
    assert [(gate.name, gate.verdict) for gate in report.gates] == [("every_slice_gains", "fail")]
    assert "number is missing" in report.gates[0].why


def test_accuracy_that_flips_nowhere_is_not_proven_by_a_few_items():
    settings = SETTINGS.model_copy(update={"max_accuracy_drop": 0.02})
    for items, verdict in ((20, "inconclusive"), (300, "pass")):
        right = np.ones(items)
        found = compared(lora=samples(lowered(1.5), right), qlora=samples(lowered(1.5), right))
        assert verdicts(found, settings)["qlora_keeps_accuracy"] == verdict


def test_answers_of_one_cluster_stop_as_one():
    facts = {row: Fact(row, f"patient {int(row) % 5}", 9, "s", "en", "short") for row in FACTS}
    models = {"base": samples(BASE), "qlora": samples(lowered(1.5), stopped=np.ones(60))}
    found = compare_arms(models, facts, [trained("qlora")], "qlora", "qlora", SETTINGS)
    assert found.stop_rate.items == 5
    assert found.stop_rate.low < 0.7
    assert compared(qlora=models["qlora"]).stop_rate.low > 0.95


def test_accuracy_stop_rate_and_forgetting_have_their_margins():
    right = (rng.random(ITEMS) < 0.6).astype(float)
    worse = right * (rng.random(ITEMS) < 0.7)
    general = {("general_piqa", "accuracy"): right, ("general_nll", "nll_nats"): np.full(ITEMS, 3.0)}
    hurt = {("general_piqa", "accuracy"): worse, ("general_nll", "nll_nats"): np.full(ITEMS, 3.5)}
    found = compared(
        base=samples(BASE, right, general=general), lora=samples(lowered(1.5), right),
        qlora=samples(lowered(1.5), worse, stopped=np.arange(ITEMS) % 2 * 1.0, general=hurt),
    )  # fmt: skip
    strict = {
        "max_accuracy_drop": 0.05,
        "min_stop_rate": 0.8,
        "max_forgetting_nats": 0.1,
        "max_forgetting_accuracy": 0.05,
    }
    loose = {"max_accuracy_drop": 0.5, "min_stop_rate": 0.2, "max_forgetting_nats": 1.0, "max_forgetting_accuracy": 0.5}
    names = ("qlora_keeps_accuracy", "candidate_stops", "keeps_general_text", "keeps_general_piqa")
    for settings, verdict in ((strict, "fail"), (loose, "pass")):
        found_verdicts = verdicts(found, SETTINGS.model_copy(update=settings))
        assert {name: found_verdicts[name] for name in names} == dict.fromkeys(names, verdict)


@pytest.mark.parametrize(("served", "verdict"), [(Served(ms_per_token=40, peak_bytes=10**9), "pass"), (None, "fail")])
def test_limits_of_time_and_memory_are_held_against_a_process_of_its_own(served, verdict):
    settings = SETTINGS.model_copy(update={"max_ms_per_token": 50, "max_memory_gb": 1.5})
    found = verdicts(compared(qlora=samples(lowered(1.5))), settings, served=served)
    assert (found["fast_enough"], found["small_enough"]) == (verdict, verdict)


def test_a_gate_that_is_turned_off_is_reported_and_a_version_alone_has_no_gates_of_the_method():
    report = judge(compared(qlora=samples(lowered(1.5))), SETTINGS, None, has_baseline=False)
    assert "max_accuracy_drop is null" in report.off
    assert any(line.startswith("min_retention: no LoRA arm") for line in report.off)
    assert report.verdict == "pass"


def test_every_gate_has_a_setting_and_every_setting_a_gate():
    off = dict.fromkeys(
        name for name, field in GateSpec.model_fields.items() if type(None) in getattr(field.annotation, "__args__", ())
    )
    report = judge(compared(qlora=samples(lowered(1.5))), GateSpec(**off), None)
    assert len(report.off) == len(off) == 11
    assert report.verdict == "fail"  # no gate ran


# --- deciding -----------------------------------------------------------------------------------------------


def at(value, low, high, **more):
    return Estimate(value=value, low=low, high=high, error=0.1, **more)


def test_a_missing_number_never_passes():
    assert interval_verdict("at least", 0.0, None)[0] == "fail"
    for unknown in (math.nan, math.inf, -math.inf):
        assert interval_verdict("at most", 0.0, at(unknown, -1.0, -0.5))[0] == "fail"
        assert interval_verdict("at least", 0.0, at(unknown, 0.5, 1.0))[0] == "fail"


@pytest.mark.parametrize("ends", [(math.nan, math.nan), (-math.inf, math.inf), (math.nan, 1.0)])
@pytest.mark.parametrize("direction", ["at least", "more than", "at most"])
def test_an_interval_that_is_not_known_never_decides(direction, ends):
    assert interval_verdict(direction, 0.0, at(0.5, *ends))[0] == "inconclusive"


@pytest.mark.parametrize("limit", [math.nan, math.inf, -0.1])
def test_a_limit_that_everything_would_pass_is_refused(limit):
    settings = [name for name, field in GateSpec.model_fields.items() if name.startswith(("max_", "min_")) and field]
    assert len(settings) == 12
    for setting in settings:
        with pytest.raises(ValidationError):
            GateSpec(**{setting: limit})


@pytest.mark.parametrize(
    ("direction", "low", "high", "verdict"),
    [
        ("at least", 0.0, 1.0, "pass"), ("at least", -1.0, -0.1, "fail"), ("at least", -1.0, 0.0, "inconclusive"),
        ("more than", 0.0, 1.0, "inconclusive"), ("more than", 0.1, 1.0, "pass"), ("more than", 0.0, 0.0, "fail"),
        ("at most", -1.0, 0.0, "pass"), ("at most", 0.1, 1.0, "fail"), ("at most", 0.0, 0.1, "inconclusive"),
    ],
)  # fmt: skip
def test_only_a_whole_interval_decides(direction, low, high, verdict):
    assert interval_verdict(direction, 0.0, at((low + high) / 2, low, high))[0] == verdict


def test_what_would_decide_is_items_or_seeds_whichever_the_doubt_comes_from():
    # ((1.645 + 0.842) x 0.1 / 0.2) squared is 1.545.
    assert "619 items decide it (now 400)" in more_needed(at(0.2, -0.01, 0.4, items=400), 0.0, 0.95)
    assert "5 seeds decide it (now 3)" in more_needed(
        at(0.2, -0.01, 0.4, items=400, seeds=3, seed_share=0.9), 0.0, 0.95
    )
    assert "no number of items" in more_needed(at(0.0, -1, 1, items=400), 0.0, 0.95)


def test_what_would_decide_also_shrinks_an_interval_that_is_wider_than_its_error():
    # All 8 of 8 answers stop: from 0.747 up. Eleven right ones would reach 0.8; nine would not.
    found = proportion(np.ones(8), 0.95)
    assert (found.low < 0.8, proportion(np.ones(9), 0.95).low < 0.8) == (True, True)
    needed = int(re.search(r"about (\d+) items", more_needed(found, 0.8, 0.95))[1])
    assert proportion(np.ones(needed), 0.95).low >= 0.8


def test_no_gates_at_all_fail():
    assert overall([]) == "fail"
    assert overall(["pass", "inconclusive"]) == "inconclusive"
    assert overall(["pass", "inconclusive", "fail"]) == "fail"


def test_a_gate_whose_number_no_task_gives_is_refused_before_the_run():
    with pytest.raises(ValidationError, match="max_forgetting_nats needs general_nll"):
        RunSpec(gates=GateSpec(max_forgetting_nats=0.1))


def test_the_comparison_is_written_in_sentences():
    found = compared(lora=samples(BASE - 2 * TOKENS), qlora=samples(BASE - 1.5 * TOKENS))
    assert "QLoRA keeps 75.0% [75.0%, 75.0%] of LoRA's loss gain" in list(sentences(found))
