"""A warm start begins with the champion, on new rows and old ones, and never sees what is held out.

The registry, the ledger, the split, the training worker's own code and a tiny base are real; workers run in this
process. The whole chain with a warm start, killed and forced: `pytest -m slow tests/training/test_warm_start.py`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.errors import ConfigError, GateError, StoreError
from data_contracts.lineage import LINEAGE_TAG
from data_contracts.reports import Start
from data_contracts.train_spec import TrainSpec, arms_of
from tasks.data.curation.trained_rows import ids_of, publish_ids, read_ids
from tasks.pipeline.policies import stage_key
from tasks.release import registry
from tasks.release.champion import champion_baseline
from tasks.reproduction.dataset import RebuiltSplits
from tasks.reproduction.reproduce import begin_again, train_again
from tasks.runtime.mlflow_client import connect
from tasks.runtime.store import Store
from tasks.training.warm_start import (
    AdapterShape,
    choose_rows,
    choose_start,
    differences,
    origin_of,
)
from tests.support.curated import facts
from tests.support.curated import run as curate_rows
from tests.support.generations import (
    NAME,
    Generation,
    Place,
    workers_here,  # noqa: F401 a fixture of this module too
)
from tests.support.releases import rollback_version

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = [f"{i:064x}" for i in range(100)]


# --- which rows ---------------------------------------------------------------------------------------------


def test_all_new_rows_are_taken_and_old_ones_make_the_share_asked_for():
    for share, replayed in ((0.0, 0), (0.2, 5), (0.5, 20), (0.8, 80), (0.9, 80), (1.0, 80)):
        chosen = choose_rows(IDS, set(IDS[:80]), share)
        assert (chosen.new, chosen.old, len(chosen.replayed)) == (IDS[80:], IDS[:80], replayed)
        assert len(set(chosen.replayed)) == replayed and set(chosen.replayed) <= set(IDS[:80])


def test_replayed_are_the_same_rows_whatever_else_comes():
    few, more = (choose_rows(IDS[:last], set(IDS[:70]), 0.3).replayed for last in (90, 100))
    assert set(few) < set(more) and more == sorted(more) and more[:3] != IDS[:3]
    shuffled = choose_rows(IDS[::-1], set(IDS[:70]), 0.3).replayed
    assert shuffled == more[::-1]


def test_adapters_fit_if_they_have_one_form_whatever_their_dropout_and_their_words_for_layers():
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["all-linear"], "use_dora": False}
    ours = AdapterShape(config, ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"])
    theirs = AdapterShape(config | {"target_modules": ["q"], "lora_dropout": 0.1}, ours.tensors[::-1])
    assert differences(theirs, ours) == []
    found = differences(AdapterShape(config | {"r": 8, "use_dora": True}, ["base_model.model.v.lora_A.weight"]), ours)
    assert found == [
        "rank 8 there and 4 here",
        "use_dora True there and False here",
        "1 adapted layers there and 1 here, not the same (such as q)",
    ]


# --- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"replay_share": 0.1}, "set warm_start to champion"),
        ({"warm_start": "champion", "init": "pissa"}, "init=pissa with parts of the base: drop one"),
        ({"warm_start": "champion", "replay_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_of_a_warm_start_that_cannot_work_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        TrainSpec(**settings)


def test_a_variant_may_start_otherwise_than_the_other_arms():
    fresh = {"name": "fresh", "method": "qlora", "settings": {"warm_start": "never"}}
    arms = arms_of(TrainSpec(warm_start="champion", replay_share=0.2, variants=[fresh]))
    assert {arm.name: (arm.settings.warm_start, arm.settings.replay_share) for arm in arms} == {
        "lora": ("champion", 0.2), "qlora": ("champion", 0.2), "fresh": ("never", 0.5),
    }  # fmt: skip


def test_settings_that_an_arm_does_not_read_are_left_to_the_others():
    arms = arms_of(TrainSpec(methods=["lora", "qlora", "full"], dropout=0.1, quant_type="fp4"))
    assert [(arm.settings.dropout, arm.settings.quant_type) for arm in arms] == [
        (0.1, "nf4"),
        (0.1, "fp4"),
        (0.0, "nf4"),
    ]


def test_a_training_is_known_by_its_adapter_and_rows_whatever_chose_them():
    start = Start(
        version="1", note="m version 1", adapter=None, rows=_ref("rows"), new_rows=1, old_rows=2, replayed_rows=1,
        trained=None,
    )  # fmt: skip
    keys = {stage_key("train", {"settings": TrainSpec(**settings)}) for settings in ({}, {"warm_start": "champion"})}
    keys |= {stage_key("train", {"settings": TrainSpec(), "start": found}) for found in (None, start)}
    assert len(keys) == 1


def _ref(name: str):
    return FileRef(path=name, sha256=name)


# --- over generations ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("warm"), tiny_base)


@pytest.fixture(scope="module")
def generations(place) -> list[Generation]:
    """Three, over 60, 90 and 140 rows; each is champion when the next begins."""
    return [place.generation(rows) for rows in (60, 90, 140)]


def rows_of(place: Place, file) -> set[str]:
    return set(ids_of(place.store.path(file)))


def test_each_generation_starts_from_the_champion_before(generations):
    first, second, third = generations
    assert [found.start.version for found in generations] == [None, "1", "2"]
    assert first.start.note == "grows has no champion yet"
    for before, after in ((first, second), (second, third)):
        assert after.arm.step0_sha256 == before.arm.adapter.sha256 != after.arm.adapter.sha256
        assert after.start.note == f"grows version {before.version}"


def test_a_warm_start_trains_on_every_new_row_and_as_many_old_ones(place, generations):
    for before, after in pairwise(generations):
        here, trained = rows_of(place, after.data.train), rows_of(place, after.start.rows)
        new = here - rows_of(place, before.data.train)
        assert new <= trained <= here
        counts = (after.start.new_rows, after.start.old_rows, after.start.replayed_rows)
        assert counts == (len(new), len(here) - len(new), len(new)) and len(trained) == 2 * len(new)
        assert ids_of(place.store.path(after.start.rows)) == sorted(trained)


def test_what_a_version_has_seen_is_known_through_its_ancestors(place, generations):
    seen: set[str] = set()
    for found in generations:
        seen |= rows_of(place, found.start.rows)
        registered = registry.resolve(place.model, f"models:/grows/{found.version}")
        assert set(read_ids(Path(registered.trained.path))) == seen
        assert registered.started_from == found.start.version
    assert rows_of(place, generations[2].start.rows) < seen


def test_a_row_that_is_ever_held_out_is_in_no_generations_training(place, generations):
    held_out = [rows_of(place, found.data.test) | rows_of(place, found.data.validation) for found in generations]
    assert len(held_out[0]) > 5 and held_out[0] < held_out[1] < held_out[2]
    for found in generations:
        assert not rows_of(place, found.start.rows) & held_out[2]
    registered = registry.champion(place.model, NAME)
    assert not set(read_ids(Path(registered.trained.path))) & held_out[2]


def test_the_same_rows_again_start_where_they_started_before(place, generations):
    origin, passed = origin_of(place.model, NAME, place.store.path(generations[2].data.train))
    assert passed == ["grows version 3 was trained on every row that is here"]
    assert place.start(generations[2].data) == generations[2].start
    assert origin.version == "2"


def test_without_anything_new_in_the_whole_line_it_is_scratch_with_the_reason(place, generations):
    first = generations[0].data
    start = place.start(first)
    assert start.note == "nothing is new to grows version 1, which started from scratch"
    assert (start.version, start.adapter, start.rows, start.new_rows) == (
        None,
        None,
        first.train,
        first.splits["train"],
    )


def test_the_champion_itself_is_judged_against_the_one_it_took_over_from(place, generations):
    adapters = [found.arm.adapter for found in generations]
    found = [champion_baseline(place.model, NAME, adapter, place.base) for adapter in (*adapters, adapters[2])]
    assert [of.version for of in found] == ["3", "3", "2", "2"]
    assert champion_baseline(place.model, "nobody", adapters[0], place.base) is None


def test_the_champions_adapter_registered_once_more_needs_no_other_judgement(place, generations):
    """As a forced run does: it was judged against the version before, and finds itself in production."""
    _, second, third = generations
    with pytest.raises(GateError, match="version 3 has become champion since"):
        place.register(second.data, second.arm, judged="1")
    version = place.register(third.data, third.arm, judged="2")
    assert registry.champion(place.model, NAME).version == version == "5"
    rollback_version(place.model, NAME)


def test_a_warm_started_version_is_made_again_from_its_parent(place, generations, tmp_path):
    second, elsewhere = generations[1], Store(tmp_path)

    def absolute(name: str) -> FileRef:
        ref = getattr(second.data, name)
        return ref.model_copy(update={"path": str(place.store.path(ref).resolve())})

    then = registry.recorded_lineage(place.model, registry.resolve(place.model, f"models:/{NAME}/2"))
    rows = RebuiltSplits(*map(absolute, ("train", "validation", "test")), note="", compared=[])
    base = place.base.model_copy(update={"path": str(place.store.path(place.base.path).resolve())})
    begin = begin_again(place.spec(), elsewhere, base, then, rows)
    assert {item.what: item.same for item in begin.compared} == {
        "base": True, "step-0 adapter": True, "rows of the warm start": True,
    }  # fmt: skip
    assert train_again(elsewhere, base, begin, rows, then, 1).adapter.sha256 == second.arm.adapter.sha256


# --- what does not fit --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def more(place, generations) -> DatasetManifest:
    return curate_rows(place.store, facts(170), test_fraction=0.2, validation_fraction=0.1)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rank": 8}, "grows version 3 has another adapter: rank 4 there and 8 here"),
        ({"alpha": 16}, "alpha 8 there and 16 here"),
        (
            {"target_modules": ["q_proj"]},
            "14 adapted layers there and 2 here, not the same (such as model.layers.0.mlp.down_proj)",
        ),
        ({"use_rslora": True}, "use_rslora False there and True here"),
        ({"use_dora": True}, "use_dora False there and True here"),
    ],
)
def test_an_adapter_of_another_shape_is_no_start(place, more, settings, why):
    start = place.start(more, **settings)
    assert why in start.note
    assert (start.version, start.rows, start.replayed_rows) == (None, more.train, 0)


def test_another_base_or_method_is_no_start(place, more):
    other = place.base.model_copy(update={"digest": "d"})
    assert place.start(more, base=other).note == "grows version 3 has a different base model"
    full = place.origin(more).model_copy(update={"method": "full"})
    start = choose_start(place.store, place.inputs(more, full), 0.5)
    assert start.note == "grows version 3 was trained with full, and this arm has LoRA layers"


def test_a_champion_that_learned_what_is_held_out_here_is_no_start(place, more):
    learned = {*rows_of(place, generations_rows(place, more)), *sorted(rows_of(place, more.test))[:3]}
    origin = place.origin(more)
    ids = publish_ids(place.store, learned)
    origin = origin.model_copy(update={"trained": ids.model_copy(update={"path": str(place.store.path(ids))})})
    start = choose_start(place.store, place.inputs(more, origin), 0.5)
    assert start.note == "grows version 3 was trained on 3 rows that are held out here"


def generations_rows(place: Place, data: DatasetManifest):
    return place.start(data, share=0.0).rows


def test_the_arms_own_dropout_is_kept_and_nothing_but_weights_is_taken(place, more):
    start = place.start(more, dropout=0.2)
    files = sorted(file.name for file in place.store.path(start.adapter.folder).iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((place.store.path(start.adapter.folder) / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.2
    assert start.adapter.sha256 == registry.champion(place.model, NAME).adapter.sha256


# --- what is broken -----------------------------------------------------------------------------------------


@pytest.fixture
def champion_files(place, generations):
    """The champion's files in the registry; each is put back."""
    registered = registry.champion(place.model, NAME)
    files = [Path(registered.adapter.folder) / "adapter_model.safetensors", Path(registered.trained.path)]
    before = [file.read_bytes() for file in files]
    yield files
    for file, content in zip(files, before, strict=True):
        file.write_bytes(content)


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_is_not_the_registered_one_stops_the_run_and_says_what_to_do(place, more, champion_files, which):
    file = champion_files[which]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=f"{file.name} of grows version 3 is not the file") as caught:
        place.start(more)
    assert "roll back to a whole version" in caught.value.problems[0].act


def test_an_adapter_that_is_gone_stops_the_run(place, more, champion_files):
    champion_files[0].unlink()
    with pytest.raises(StoreError, match="no file instead of"):
        place.start(more)


def test_rows_that_are_gone_stop_the_run(place, more, champion_files):
    champion_files[1].unlink()
    with pytest.raises(StoreError, match=r"trained_rows\.txt of grows version 3 is not the file .*no file instead of"):
        place.start(more)


def test_of_a_version_from_before_lineage_rows_that_are_gone_are_no_start(place, more, champion_files):
    champion_files[1].unlink()
    with without_tag(place, LINEAGE_TAG):
        start = place.start(more)
    assert start.note == "trained_rows.txt, the training rows of grows version 3, is gone from the registry"
    assert start.version is None


def test_a_version_from_before_rows_were_kept_is_no_start(place, more):
    with without_tag(place, registry.TRAINED_TAG):
        assert "registered before its training rows were kept" in place.start(more).note


@contextmanager
def without_tag(place: Place, tag: str) -> Iterator[None]:
    """Version 3 as it was registered before there was such a tag."""
    client = connect(place.model)
    kept = client.get_model_version(NAME, "3").tags[tag]
    client.delete_model_version_tag(NAME, "3", tag)
    try:
        yield
    finally:
        client.set_model_version_tag(NAME, "3", tag, kept)


def test_an_ancestor_that_is_no_longer_registered_is_named(place, generations, monkeypatch):
    def gone(store, uri, option="--model"):
        raise ConfigError

    monkeypatch.setattr(registry, "resolve", gone)
    note = place.start(generations[2].data).note
    assert note == "nothing is new to grows version 3, and version 2, which it started from, is no longer registered"
