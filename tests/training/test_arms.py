"""Seeds and variants: which trainings a spec asks for, and that a name changes none. Run: pytest
tests/training/test_arms.py"""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from data_contracts.train_spec import TrainSpec, arms_of, candidate_arm
from tasks.models.base import start_settings
from tasks.pipeline.policies import stage_key

R64 = {"name": "qlora_r64", "method": "qlora", "settings": {"rank": 64, "alpha": 128, "learning_rate": 1e-4}}


def test_each_arm_is_trained_once_with_every_seed():
    arms = arms_of(TrainSpec(seeds=[1, 2], variants=[R64]))
    assert [arm.name for arm in arms] == [
        "lora-1", "lora-2", "qlora-1", "qlora-2", "qlora_r64-1", "qlora_r64-2",
    ]  # fmt: skip
    assert [arm.arm for arm in arms[4:]] == ["qlora_r64"] * 2
    assert {arm.settings.rank for arm in arms[:4]} == {16}
    assert {(arm.settings.rank, arm.settings.alpha, arm.settings.learning_rate) for arm in arms[4:]} == {
        (64, 128, 1e-4)
    }


def test_a_single_seed_needs_no_name():
    assert [arm.name for arm in arms_of(TrainSpec())] == ["lora", "qlora"]


def test_a_variants_learning_rate_overrules_that_of_its_method():
    (arm,) = (
        arm for arm in arms_of(TrainSpec(variants=[R64], learning_rates={"qlora": 5e-4})) if arm.arm == "qlora_r64"
    )
    assert arm.settings.learning_rates.get("qlora", arm.settings.learning_rate) == 1e-4


def test_arms_of_a_seed_share_a_start_and_other_seeds_have_their_own():
    lora_1, lora_2, qlora_1, _ = (
        start_settings(arm.method, arm.seed, arm.settings, "fp32") for arm in arms_of(TrainSpec(seeds=[1, 2]))
    )
    assert lora_1 == qlora_1 != lora_2


def test_more_seeds_and_variants_do_not_train_again_what_was_trained():
    few, many = TrainSpec(), TrainSpec(seeds=[17, 18], methods=["qlora", "lora"], variants=[R64])
    keys = [
        {
            (arm.method, arm.seed): stage_key("train", {"seed": arm.seed, "settings": arm.settings})
            for arm in arms_of(train)
        }
        for train in (few, many)
    ]
    own = stage_key("train", {"seed": 17, "settings": TrainSpec(rank=8)})
    assert keys[0]["lora", 17] == keys[1]["lora", 17] != own


def test_the_candidate_is_qlora_else_lora_else_the_last():
    assert candidate_arm(["lora", "qlora", "qlora_r64"]) == "qlora"
    assert candidate_arm(["full", "lora"]) == "lora"
    assert candidate_arm(["full", "prefix"]) == "prefix"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"variants": [R64, R64]}, "the name qlora_r64 is taken"),
        ({"variants": [R64 | {"name": "champion"}]}, "the name champion is taken"),
        ({"variants": [R64 | {"settings": {"seeds": [3]}}]}, "cannot have its own seeds"),
        ({"variants": [R64 | {"settings": {"rank": 0}}]}, "qlora_r64: rank Input should be greater"),
        ({"variants": [R64 | {"settings": {"ranks": 8}}]}, "qlora_r64: ranks Extra inputs"),
        ({"variants": [R64 | {"name": "../up"}]}, "should match pattern"),
    ],
)
def test_seeds_and_variants_that_cannot_work_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        TrainSpec(**settings)


def test_the_released_adapter_is_the_first_seeds_not_the_best():
    from flows.retrain import released_of

    arms = [SimpleNamespace(arm=arm, name=f"{arm}-{seed}") for arm in ("lora", "qlora") for seed in (1, 2)]
    assert released_of(arms).name == "qlora-1"
