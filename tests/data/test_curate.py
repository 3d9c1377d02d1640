"""Copies leave, splits never change as data grow, and nothing held out reaches training."""

import json
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.data_spec import CurateSpec
from data_contracts.errors import DataError, StoreError
from data_contracts.rows import Message
from tasks.data.curation.core.shingles import words
from tasks.data.curation.core.split import Known, position
from tasks.data.curation.curate import Curation, curate_rows
from tasks.data.curation.dataset_files import SPLITS
from tasks.data.curation.row_ledger import (
    CuratedBatch,
    HeldOut,
    LedgerEntry,
    batch_before,
    held_out,
    known_clusters,
    known_splits,
    record_batch,
    release_rows,
    releases,
    row_history,
)
from tasks.data.validation.core.row_hashes import content_hash, normalise
from tasks.runtime.store import Store
from tests.support.curated import NOWHERE, facts, run, validated


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parts are worked on here: a pool of processes costs each run seconds (test_data.py has it)."""
    monkeypatch.setattr("tasks.runtime.partitions.free_cores", lambda: 1)


def lines(store: Store, ref: FileRef) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.path(ref).read_text().splitlines()]


def splits(store: Store, manifest: DatasetManifest) -> dict[str, str]:
    """Question -> split."""
    return {
        row["messages"][0]["content"]: name
        for name in ("train", "validation", "test")
        for row in lines(store, getattr(manifest, name))
    }


def test_every_row_is_kept_quarantined_or_a_duplicate(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = facts(100)
    manifest = run(store, [*rows, *rows[:7]], quarantined=3)
    assert (manifest.rows_in, manifest.kept, manifest.quarantined, manifest.duplicates) == (110, 100, 3, 7)
    assert sum(manifest.splits.values()) == 100
    assert [row["kind"] for row in lines(store, manifest.duplicate_rows)] == ["exact"] * 7


def test_rows_that_vanish_between_the_steps_are_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    data = validated(store, facts(50)).model_copy(update={"rows_in": 51, "rows_kept": 51})
    with pytest.raises(AssertionError, match="51 rows in, 50 kept"):
        curate_rows(store, data, Curation(CurateSpec(), "model"))


def test_the_order_of_the_rows_changes_nothing(tmp_path: Path) -> None:
    rows = [*facts(200), *[(question, answer + " indeed") for question, answer in facts(20)]]
    shuffled = random.Random(1).sample(rows, len(rows))
    first, second = Store(tmp_path / "a"), Store(tmp_path / "b")
    before, after = run(first, rows), run(second, shuffled)
    assert splits(first, before) == splits(second, after)
    ids = [row["row_id"] for row in lines(second, after.train)]
    assert ids == sorted(ids)
    assert before.duplicates == after.duplicates > 0


def test_a_row_keeps_its_split_when_data_grow_and_caps_fill_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    spec = {"test_fraction": 0.3, "max_test_rows": 30, "validation_fraction": 0.2, "max_validation_rows": 10}
    before = run(store, facts(100), **spec)
    grown = [*facts(400, seed=1), *facts(100)]
    after = run(store, grown, **spec)
    assert before.splits["test"] > 0
    old, new = splits(store, before), splits(store, after)
    assert {question: new[question] for question in old} == old
    assert after.splits["test"] == 30
    assert after.splits["validation"] == 10
    assert after.known_rows == 100


def test_without_a_ledger_the_hash_alone_keeps_most_rows_in_place(tmp_path: Path) -> None:
    before = run(Store(tmp_path / "a"), facts(200))
    after = run(Store(tmp_path / "b"), [*facts(200, seed=2), *facts(200)])
    old, new = splits(Store(tmp_path / "a"), before), splits(Store(tmp_path / "b"), after)
    assert {question: new[question] for question in old} == old


def test_the_same_data_twice_give_the_same_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [*facts(100), *[(question, answer + " x") for question, answer in facts(50)]]
    first, second = run(store, rows), run(store, rows)
    same = ("train", "validation", "test", "duplicate_rows", "splits")
    assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]


def test_other_models_have_their_own_ledger(tmp_path: Path) -> None:
    store = Store(tmp_path)
    data = validated(store, facts(50))
    curate_rows(store, data, Curation(CurateSpec(), "one"))
    assert curate_rows(store, data, Curation(CurateSpec(), "two")).known_rows == 0
    assert curate_rows(store, data, Curation(CurateSpec(), "one")).known_rows == 50


def test_copies_of_a_held_out_row_never_reach_training(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = facts(200)
    placed = splits(store, run(store, rows, test_fraction=0.3))
    held_out = {question for question, split in placed.items() if split == "test"}
    assert len(held_out) > 20
    near = [(question, answer + " indeed") for question, answer in rows if question in held_out]
    loud = [(question.upper(), answer) for question, answer in rows if question in held_out]
    later = run(store, [*near, *facts(100, seed=3), *loud, *rows], test_fraction=0.3)
    assert later.duplicates == len(loud)
    assert later.reasons == {"near_test_item": len(near)}
    assert not {row["messages"][0]["content"].casefold() for row in lines(store, later.train)} & {
        question.casefold() for question in held_out
    }
    # Even when the original has left the data: the split follows from the answer, and the ledger knows the copy.
    alone = run(store, [*facts(100, seed=4), *loud, *near], test_fraction=0.3)
    assert not {row["messages"][0]["content"].casefold() for row in lines(store, alone.train)} & {
        question.casefold() for question in held_out
    }


def test_one_answer_asked_in_two_ways_stays_on_one_side(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = facts(150)
    other_ways = [(f"Tell me at length about number {i} please", answer) for i, (_, answer) in enumerate(rows)]
    manifest = run(store, [*rows, *other_ways], test_fraction=0.3)
    assert manifest.duplicates == 0
    train = {row["messages"][1]["content"] for row in lines(store, manifest.train)}
    test = {row["messages"][1]["content"] for row in lines(store, manifest.test)}
    assert test
    assert not train & test
    # An answer that comes later, asked in a third way, follows the row that is already there.
    third = [(f"Third way {i} of asking for it", answer) for i, (_, answer) in enumerate(rows)]
    later = run(store, [*rows, *third], test_fraction=0.6)
    train = {row["messages"][1]["content"] for row in lines(store, later.train)}
    assert not train & {row["messages"][1]["content"] for row in lines(store, later.test)}


def test_a_split_that_would_be_empty_stops_the_run_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row falls into the test split \(3 distinct rows, test_fraction 0.0"):
        run(Store(tmp_path), facts(3), test_fraction=0.0)


def test_the_first_split_of_a_row_counts_for_ever(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record_batch(
        store,
        "m",
        CuratedBatch(
            "s1", [LedgerEntry("a", "kept", None, "train"), LedgerEntry("q", "quarantined", "too_long", None)]
        ),
    )
    record_batch(store, "m", CuratedBatch("s2", [LedgerEntry("a", "duplicate", "near", "test")]))
    record_batch(store, "m", CuratedBatch("s1", [LedgerEntry("a", "kept", None, "train")]))
    assert known_splits(store, "m") == {"a": Known("train", True)}
    assert known_splits(store, "other") == {}


def test_a_damaged_ledger_is_a_store_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.files.mkdir()
    store.ledger.write_text("no database at all, but long enough to be read as one " * 20)
    with pytest.raises(StoreError, match="ledger"):
        known_splits(store, "m")


def test_positions_are_uniform() -> None:
    places = [position(str(i)) for i in range(2000)]
    assert all(0 <= place < 1 for place in places)
    assert 0.08 < sum(place < 0.1 for place in places) / 2000 < 0.12


def talk(prompt: str, answer: str) -> tuple[Message, ...]:
    return Message("user", prompt), Message("assistant", answer)


def test_exact_copies_differ_only_in_case_white_space_and_unicode_form() -> None:
    rows = [talk("Café?", "yes"), talk(" cafe\u0301?", "YES\n"), talk("Cafe?", "yes"), talk("Café?", "no")]
    first, second, *others = map(content_hash, rows)
    assert first == second
    assert len({first, *others}) == 3
    assert normalise("A\u00a0 b\nC") == "a b c"


def test_labels_and_boilerplate_do_not_tie_rows_together(tmp_path: Path) -> None:
    store = Store(tmp_path)
    labels = [(f"question number {i} about cards", "card_arrival") for i in range(60)]
    thanks = [(f"remark {i} of a customer", "Thank you for your patience.") for i in range(60)]
    manifest = run(store, [*labels, *thanks], test_fraction=0.3)
    assert manifest.splits["test"] > 10
    assert manifest.splits["train"] > 10


# --- the ledger -----------------------------------------------------------------------------------------------


def test_only_what_changed_is_recorded_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = [LedgerEntry("a", "kept", None, "train"), LedgerEntry("b", "quarantined", "refusal", None)]
    assert record_batch(store, "m", CuratedBatch("s1", first)) == 2
    assert record_batch(store, "m", CuratedBatch("s2", [*first, LedgerEntry("c", "kept", None, "test")])) == 1
    assert record_batch(store, "m", CuratedBatch("s3", [LedgerEntry("b", "kept", None, "train")])) == 0
    assert [tuple(event) for event in row_history(store, "m", "a")] == [("s1", "kept", None, "train")]
    assert [event.fate for event in row_history(store, "m", "b")] == ["quarantined", "kept"]


def test_held_out_texts_batches_and_releases_are_remembered(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = HeldOut("a", "test", talk("q", "a"))
    record_batch(store, "m", CuratedBatch("s1", [], [row], NOWHERE))
    record_batch(store, "m", CuratedBatch("s2", [], [row], NOWHERE))
    assert held_out(store, "m") == [row]
    assert held_out(store, "other") == []
    assert batch_before(store, "m", "s1") is None
    assert batch_before(store, "m", "s2") == ("s1", NOWHERE)
    assert batch_before(store, "m", "new") == ("s2", NOWHERE)
    release_rows(store, "m", ["x", "y"], "refusal", "support replies")
    release_rows(store, "m", ["x"], "refusal", "again")
    assert [(r.row_id, r.why) for r in releases(store, "m")] == [("x", "support replies"), ("y", "support replies")]


def _in_a_process_of_its_own(root: str, first: int) -> dict[str, str]:
    store = Store(Path(root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.runtime.partitions.free_cores", lambda: 1)
        return splits(store, run(store, facts(120)[first : first + 80], test_fraction=0.4))


def test_two_processes_at_once_give_every_row_one_split(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        one, two = pool.map(_in_a_process_of_its_own, [str(tmp_path)] * 2, [0, 40])
    both = one.keys() & two.keys()
    assert len(both) > 30
    assert {row: one[row] for row in both} == {row: two[row] for row in both}
    assert len(known_splits(Store(tmp_path), "model")) == len(one.keys() | two.keys())


# --- nothing leaks --------------------------------------------------------------------------------------------


def similarity(a: str, b: str) -> float:
    one, two = (frozenset(zip(*(words(t)[i:] for i in range(5)), strict=False)) for t in (a, b))
    return len(one & two) / len(one | two) if one | two else 1.0


def nearness(a: tuple[str, str], b: tuple[str, str]) -> float:
    """Near copies are alike as a whole and in their answers."""
    return min(similarity(" ".join(a), " ".join(b)), similarity(a[1], b[1]))


def _family(draw: random.Random, base: int) -> list[tuple[str, str]]:
    """A long row and near copies of it, one to four words apart."""
    words_ = [f"w{draw.randrange(400)}" for _ in range(60)]
    rows = []
    for _ in range(draw.randrange(1, 5)):
        changed = list(words_)
        for _ in range(draw.randrange(0, 4)):
            changed[draw.randrange(60)] = f"x{draw.randrange(10_000)}"
        rows.append((f"Tell me about {base}", " ".join(changed)))
    return rows


@pytest.mark.parametrize("seed", range(int(os.environ.get("TUNEGATE_APPEND_SEEDS", "1"))))
def test_in_any_order_of_appends_nothing_near_a_held_out_row_trains_and_no_split_changes(
    tmp_path: Path, seed: int
) -> None:
    draw, store = random.Random(seed), Store(tmp_path)
    pool = [row for base in range(70) for row in _family(draw, base)]
    draw.shuffle(pool)
    cuts = sorted(draw.sample(range(20, len(pool)), 3))
    seen: dict[tuple[str, str], str] = {}
    for end in [*cuts, len(pool)]:
        # Cumulative data, sometimes without their oldest rows, in a new order.
        batch = pool[draw.choice([0, 0, end // 3]) : end]
        # Decontamination would hide a hole in the rules of near copies.
        settings = {"test_fraction": 0.3, "decontaminate": False, "max_near_duplicate_rate": 1.0}
        manifest = run(store, draw.sample(batch, len(batch)), **settings)
        assert manifest.rows_in == manifest.kept + manifest.quarantined + manifest.duplicates
        placed = {
            (row["messages"][0]["content"], row["messages"][1]["content"]): name
            for name in ("train", "validation", "test")
            for row in lines(store, getattr(manifest, name))
        }
        assert {row: placed[row] for row in placed if row in seen} == {row: seen[row] for row in placed if row in seen}
        seen |= placed
        held = [(row.messages[0].content, row.messages[1].content) for row in held_out(store, "model")]
        train = [row for row, name in placed.items() if name == "train"]
        assert train
        assert held
        assert max(nearness(a, b) for a in train for b in held) < 0.7


# --- clusters of the user's own ---------------------------------------------------------------------------------


def of_patients(count: int, each: int, seed: int = 0, first: int = 0) -> list[tuple[str, str, str]]:
    """Rows of patients, with nothing in common but the patient."""
    return [
        (question, answer, f"patient {first + i // each}")
        for i, (question, answer) in enumerate(facts(count * each, seed))
    ]


def sides(store: Store, manifest: DatasetManifest) -> dict[str, set[str]]:
    """Cluster -> the splits of its rows."""
    found: dict[str, set[str]] = {}
    for name in SPLITS:
        for row in lines(store, getattr(manifest, name)):
            if "cluster" in row:
                found.setdefault(row["cluster"], set()).add(name)
    return found


def test_rows_of_a_cluster_are_split_as_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = run(store, [*of_patients(60, 5), *facts(50, seed=9)], test_fraction=0.3)
    found = sides(store, manifest)
    assert len(found) == 60
    assert {len(places) for places in found.values()} == {1}
    assert set.union(*found.values()) == set(SPLITS)
    assert known_clusters(store, "model") == {cluster: min(places) for cluster, places in found.items()}


def test_a_cluster_whose_rows_have_all_left_comes_back_to_its_split(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = sides(store, run(store, of_patients(60, 2), test_fraction=0.4))
    after = sides(store, run(store, of_patients(60, 2, seed=1), test_fraction=0.1))
    assert before == after


def test_patients_whose_rows_are_copies_of_each_other_are_one_group(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = of_patients(80, 3)
    near = [(question, answer + " indeed", f"twin of {cluster}") for question, answer, cluster in rows[::3]]
    twins = [(f"Another question {i}", f"{answer} {i} other", f"twin of {cluster}") for i, (_, answer, cluster) in
             enumerate((q, " ".join(reversed(a.split())), c) for q, a, c in rows[::3])]  # fmt: skip
    manifest = run(store, [*rows, *near, *twins], test_fraction=0.4)
    assert manifest.near_duplicates == len(near)
    found = sides(store, manifest)
    assert len(found) == 160
    assert all(found[f"patient {i}"] == found[f"twin of patient {i}"] for i in range(80))
    assert set.union(*found.values()) == set(SPLITS)


def test_a_row_that_ties_patients_of_two_splits_goes_to_quarantine(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = of_patients(60, 2)
    found = sides(store, run(store, rows, test_fraction=0.4))
    held_out = next(row for row in rows if found[row[2]] == {"test"})
    trained = next(row for row in rows if found[row[2]] == {"train"})
    between = ("A third way of asking", held_out[1], trained[2])
    for _ in range(2):
        later = run(store, [*rows, between], test_fraction=0.4)
        assert later.reasons == {"bridges_splits": 1}
        assert sides(store, later) == found


def test_naming_the_field_later_takes_training_rows_of_held_out_patients_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = of_patients(30, 4)
    before = splits(store, run(store, [row[:2] for row in rows], test_fraction=0.2))
    parted = {cluster for question, _, cluster in rows if before[question] != "train"}
    manifest = run(store, rows, test_fraction=0.2)
    after = splits(store, manifest)
    assert {len(places) for places in sides(store, manifest).values()} == {1}
    assert {question: after[question] for question in after} == {question: before[question] for question in after}
    gone = {question for question, _, cluster in rows if cluster in parted and before[question] == "train"}
    assert manifest.reasons == {"bridges_splits": len(before.keys() - after.keys())}
    assert gone
    assert gone <= before.keys() - after.keys()


@pytest.mark.parametrize("seed", range(int(os.environ.get("TUNEGATE_APPEND_SEEDS", "1"))))
def test_in_any_order_of_appends_no_cluster_is_in_two_splits_and_no_split_changes(tmp_path: Path, seed: int) -> None:
    draw, store = random.Random(seed), Store(tmp_path)
    pool: list[tuple[str, ...]] = []
    for base in range(70):
        family = [(q, a, f"patient {draw.randrange(40)}") for q, a in _family(draw, base)]
        again = (f"Asked again {base}", draw.choice(family)[1], f"patient {draw.randrange(40)}")
        pool += [*family, *[again] * (draw.random() < 0.3)]
    draw.shuffle(pool)
    cuts = sorted(draw.sample(range(20, len(pool)), 3))
    clusters: dict[str, set[str]] = {}
    placed: dict[str, str] = {}
    for end in [*cuts, len(pool)]:
        batch = pool[draw.choice([0, 0, end // 3]) : end]
        settings = {"test_fraction": 0.3, "max_near_duplicate_rate": 1.0}
        manifest = run(store, draw.sample(batch, len(batch)), **settings)
        assert manifest.rows_in == manifest.kept + manifest.quarantined + manifest.duplicates
        for cluster, places in sides(store, manifest).items():
            assert clusters.setdefault(cluster, places) == places
            assert len(places) == 1
        for name in SPLITS:
            for row in lines(store, getattr(manifest, name)):
                assert placed.setdefault(row["row_id"], name) == name
    assert len(clusters) > 20


# --- which copy stays -------------------------------------------------------------------------------------------


def test_of_near_copies_the_longest_answer_stays(tmp_path: Path) -> None:
    store, answer = Store(tmp_path), " ".join(f"w{i}" for i in range(40))
    copies = [("Tell me about it", answer + end) for end in ("", " and more", " and more again", " too")]
    manifest = run(store, [*facts(100), *copies])
    assert {row["kind"] for row in lines(store, manifest.duplicate_rows)} == {"near"}
    assert len(lines(store, manifest.duplicate_rows)) == 3
    texts = [row["messages"][1]["content"] for split in SPLITS for row in lines(store, getattr(manifest, split))]
    assert [text for text in texts if text.startswith(answer)] == [copies[2][1]]


def test_too_many_near_copies_stop_the_run_and_the_ledger_learns_nothing(tmp_path: Path) -> None:
    store, answer = Store(tmp_path), " ".join(f"w{i}" for i in range(40))
    rows = [*facts(50), *[("Tell me about it", f"{answer} {i}") for i in range(50)]]
    with pytest.raises(DataError, match=r"49 of 100 distinct rows are near copies of others \(49.0%\)"):
        run(store, rows, max_near_duplicate_rate=0.48)
    assert known_splits(store, "model") == {}
    assert run(store, rows, max_near_duplicate_rate=0.5).near_duplicates == 49


def test_a_training_row_that_holds_most_of_a_test_item_is_taken_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = facts(150)
    first = run(store, rows, test_fraction=0.3)
    item = lines(store, first.test)[0]
    question, answer = (message["content"] for message in item["messages"])
    longer = (f"Forum post. {question} {answer} " + " ".join(f"more{i}" for i in range(60)), "I think so too, thanks.")
    later = run(store, [*rows, longer], test_fraction=0.3)
    assert later.reasons == {"contaminated": 1}
    assert later.contamination["test"] == 1
    (quarantined,) = lines(store, later.quarantine)
    assert quarantined["detail"] == f"row {item['row_id'][:12]}"
    kept = run(store, [*rows, longer], test_fraction=0.3, decontaminate=False)
    assert kept.reasons == {}
