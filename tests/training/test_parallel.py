"""Arms that train at the same time are the arms that train alone, in places of their own. Run: pytest
tests/training/test_parallel.py

Prefect's engine, the workers and the tiny base are real. Not tried: several GPUs, for want of them.
"""

import pytest

from data_contracts.errors import ConfigError, DataError, StoreError, TunegateError
from data_contracts.reports import Slot
from data_contracts.train_spec import TrainSpec
from tasks.evaluation.core.costs import claims, measure_costs
from tasks.pipeline.policies import stage_key
from tasks.runtime.processes import Display
from tasks.training.slots import on_cluster, share_out, slots_of, visible_gpus
from tests.support.arms import Place
from tests.support.verdicts import SETTINGS, trained

pytestmark = pytest.mark.filterwarnings("ignore")


# --- places -------------------------------------------------------------------------------------------------


def test_free_cores_are_divided_evenly_with_the_reason():
    slots = share_out(TrainSpec(parallel=3), [], free=8, cores=16)
    assert [(slot.gpu, slot.threads, slot.arms_at_once) for slot in slots] == [(None, 2, 3)] * 3
    assert slots[0].why == "the share of each of 3 arms in 8 free cores"
    assert share_out(TrainSpec(parallel=2), [], free=1, cores=2)[0].threads == 1
    assert share_out(TrainSpec(parallel=2, threads=4), [], free=1, cores=8)[1].why == "set by train.threads"


def test_each_arm_gets_a_gpu_of_its_own_by_the_name_it_has():
    names = visible_gpus(2, "GPU-aa, 5")
    assert names == ["GPU-aa", "5"] and visible_gpus(3, None) == ["0", "1", "2"] and visible_gpus(0, "") == []
    assert [slot.gpu for slot in share_out(TrainSpec(parallel=2), names, free=1, cores=1)] == names


@pytest.mark.parametrize(
    ("settings", "gpus", "shown"),
    [
        ({"parallel": 3}, ["0", "1"], "limit: 2 visible GPUs\n    next: set it to 2"),
        ({"parallel": 5}, [], "limit: 4 cores\n    next: lower train.threads, or set train.parallel to 4"),
        ({"parallel": 2, "threads": 3}, [], "train.parallel to 1"),
    ],
)
def test_more_arms_at_a_time_than_there_are_places_are_refused(settings, gpus, shown):
    with pytest.raises(ConfigError) as refused:
        share_out(TrainSpec(**settings), gpus, free=4, cores=4)
    assert shown in str(refused.value)


def test_one_arm_at_a_time_asks_for_no_place_and_two_ask_this_machine(monkeypatch):
    monkeypatch.setattr("tasks.training.slots.free_cores", lambda: 8)
    assert slots_of(TrainSpec()) == []
    first, second = slots_of(TrainSpec(parallel=2))
    assert first.threads == second.threads >= 1


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"parallel": 2, "workers": 2}, "set one of them to 1"),  # on Ray they go together
        ({"variants": [{"name": "v", "method": "lora", "settings": {"parallel": 2}}]}, "cannot have its own parallel"),
    ],
)
def test_what_does_not_go_with_parallel_is_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        TrainSpec(**settings)


def test_ray_needs_one_cluster_for_all_arms_and_gives_each_what_it_asks_for():
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        on_cluster(TrainSpec(parallel=2, engine="ray"), None)
    asked = on_cluster(TrainSpec(parallel=2, workers=2, engine="ray", threads=4), "10.0.0.1:6379")
    assert [(slot.gpu, slot.threads, slot.arms_at_once) for slot in asked] == [(None, 4, 2)] * 2


def test_how_many_train_at_a_time_is_no_part_of_what_is_trained():
    slot = Slot(gpu="1", threads=1, why="", arms_at_once=2)
    keys = {stage_key("train", {"settings": TrainSpec(parallel=n), "slot": slot if n > 1 else None}) for n in (1, 2)}
    assert len(keys) == 1


def test_equal_trainings_are_not_started_at_the_same_time():
    from flows.train_arms import groups

    assert groups(["a", "b", "c"], 2) == [[0, 1], [2]]
    assert groups(["a", "a", "b"], 2) == [[0], [1, 2]]
    assert groups(["a", "b", "a"], 3) == [[0, 1], [2]]


# --- what is shown ------------------------------------------------------------------------------------------


def test_lines_of_several_workers_say_whose_they_are(capsys):
    note = {"event": "note", "text": "packed forward"}
    with Display("train lora") as lora:
        lora.show(note)
        with Display("train qlora") as qlora:
            lora.show(note)
            qlora.show(note)
        lora.show(note)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["packed forward", "train lora: packed forward", "train qlora: packed forward", "packed forward"]


def test_a_speed_is_said_to_be_one_of_arms_side_by_side_and_only_like_is_compared():
    lora, qlora = (trained(name).model_copy(update={"side_by_side": 2}) for name in ("lora", "qlora"))
    costs = measure_costs([lora, qlora], SETTINGS)
    notes = {claim.claim: claim.note for claim in claims(None, costs, [lora, qlora])}
    assert notes["runs 20 to 30 % slower"].endswith("more time a token, up to 2 arms training side by side")
    assert measure_costs([trained("lora"), qlora], SETTINGS).speed_ratio is None


# --- trained ------------------------------------------------------------------------------------------------

TWO = share_out(TrainSpec(parallel=2, threads=1), [], free=2, cores=2)


@pytest.fixture
def place(tiny_base, tmp_path, prefect) -> Place:
    return Place(tmp_path, tiny_base)


@pytest.mark.slow
def test_two_arms_overlap_in_time_and_are_what_they_are_alone(tiny_base, tmp_path, prefect):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    together = Place(tmp_path / "a", tiny_base).train(TWO)
    alone = Place(tmp_path / "b", tiny_base).train([])
    assert max(start for start, _ in together.times) < min(end for _, end in together.times)
    assert alone.times[0][1] < alone.times[1][0]
    assert [arm.name for arm in together.arms] == [arm.name for arm in alone.arms] == ["lora", "qlora"]
    assert [arm.adapter.sha256 for arm in together.arms] == [arm.adapter.sha256 for arm in alone.arms]
    assert [(arm.side_by_side, arm.threads) for arm in (*together.arms, *alone.arms)] == [(2, 1)] * 2 + [(1, 1)] * 2


@pytest.mark.slow
def test_an_arm_that_fails_lets_the_other_finish(place):
    with pytest.raises(StoreError, match=r"gone\.jsonl"):
        place.train(TWO, lost="lora")
    assert [file.parent.name[:5] for file in place.store.files.glob("training/*/report.json")] == ["qlora"]


@pytest.mark.slow
def test_what_is_wrong_with_every_arm_is_reported_at_once(place):
    with pytest.raises(DataError) as failed:
        place.train(TWO, max_tokens=16)
    assert [problem.limit for problem in failed.value.problems] == ["16 tokens", "16 tokens"]
    assert isinstance(failed.value, TunegateError)
