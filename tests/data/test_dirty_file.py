"""A dirty file, row by row: what is repaired, masked, flagged, rejected, released, and how a row's history is reported."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_contracts.data_reports import DatasetManifest, DataState, Snapshot, ValidatedData
from data_contracts.data_spec import ContractSpec, CurateSpec, DataSpec, RulesSpec
from data_contracts.errors import ConfigError, DataError
from flows.cli.app import main
from flows.prepare_data import release_quarantined
from tasks.data.curation import row_ledger as ledger
from tasks.data.curation.curate import Curation, curate_rows
from tasks.data.curation.dataset_files import SPLITS
from tasks.data.curation.explain import row_stories, write_data_state
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.validation.core.drift import divergence, drift, ks_distance, profile
from tasks.data.validation.validate import Checks, validate
from tasks.runtime.store import Store

WORDS = ["router", "button", "light", "cable", "screen", "battery", "signal", "door", "engine", "filter", "socket"]
KEY = "AK" + "IAQ7ZL2M4X9RTPWC5B"


def good(i: int) -> dict[str, str]:
    place = " ".join(WORDS[(i * k + k) % 11] for k in range(1, 8))
    return {"prompt": f"What about case {i}?", "completion": f"In case {i} check the {place} number {i}, then go on."}


DIRTY: dict[str, Any] = {
    "mojibake": {"prompt": "Where is the cafÃ©?", "completion": "The cafÃ© is behind the old station building."},
    "personal": {"prompt": "Who can help me?", "completion": "Write to anna.schmidt@hospital-berlin.de about it."},
    "secret": {"prompt": "How do I log in?", "completion": f"Use the key {KEY} for the bucket."},
    "refusal": {"prompt": "Tell me the dose.", "completion": "As an AI language model, I cannot give medical advice."},
    "empty": {"prompt": "And then?", "completion": "   "},
    "broken": '{"prompt": "half a row, "completion"',
}
LINES = {name: 61 + place for place, name in enumerate(DIRTY)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "root")


def snapshot(store: Store, rows: list[Any]) -> Snapshot:
    store.root.mkdir(exist_ok=True)
    file = store.root / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return ingest_sources(store, DataSpec(source=[str(file)]))


def dirty(store: Store) -> Snapshot:
    return snapshot(store, [*map(good, range(60)), *DIRTY.values()])


def check(store: Store, found: Snapshot, released: Any = (), **rules: Any) -> ValidatedData:
    return validate(store, found, Checks(RulesSpec(**rules), ContractSpec(max_quarantine_rate=0.5), list(released)))


def texts(store: Store, validated: ValidatedData) -> str:
    return " ".join(text for part in validated.kept for text in pq.read_table(store.path(part))["messages"].to_pylist())


def prepared(store: Store, found: Snapshot, **rules: Any) -> DatasetManifest:
    validated = check(store, found, **rules)
    dataset = curate_rows(store, validated, Curation(CurateSpec(test_fraction=0.3), "model"))
    write_data_state(store, "model", DataState(snapshot=found, validated=validated, dataset=dataset))
    return dataset


def test_every_defect_is_repaired_masked_flagged_or_rejected_with_its_reason(store: Store) -> None:
    result = check(store, dirty(store))
    assert result.reasons == {"secret": 1, "empty_answer": 1, "unparsable": 1}
    assert result.flags == {"refusal": 1}
    assert result.repairs["mojibake"].rows == 1
    assert result.repairs["masked_EMAIL"].rows == 1
    kept = texts(store, result)
    assert json.dumps("The café is behind the old station building.") in kept
    assert "[EMAIL]" in kept
    assert "anna.schmidt" not in kept


def test_no_value_of_personal_data_or_a_secret_stands_in_any_count_example_or_detail(store: Store) -> None:
    result = check(store, dirty(store), personal_data="quarantine")
    assert result.reasons["personal_data"] == 1
    report = result.model_dump_json()
    details = [json.loads(line)["detail"] for line in store.path(result.quarantine).read_text().splitlines()]
    assert KEY not in report + "".join(details)
    assert "anna.schmidt" not in report + "".join(details)


def test_policies_keep_mask_or_quarantine(store: Store) -> None:
    result = check(store, dirty(store), personal_data="keep", secrets="mask", actions={"refusal": "quarantine"})
    assert result.reasons == {"refusal": 1, "empty_answer": 1, "unparsable": 1}
    assert "anna.schmidt" in texts(store, result)
    assert KEY not in texts(store, result)


def test_a_rule_of_the_users_own_is_a_pattern_or_a_python_function(store: Store, tmp_path: Path) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text("def short(prompt, completion):\n    return 'cafe' if 'caf' in prompt else None\n")
    custom = [{"name": "no_medicine", "field": "prompt", "forbidden": "dose"}]
    result = check(store, dirty(store), custom=custom, function=f"{rules}:short")
    assert result.reasons["custom"] == 2
    with pytest.raises(ConfigError, match="no such rule"):
        check(store, dirty(store), function=f"{rules}:other")


def test_a_released_row_comes_back_and_only_for_that_reason(store: Store) -> None:
    found = dirty(store)
    first = check(store, found)
    rows = [json.loads(line) for line in store.path(first.quarantine).read_text().splitlines()]
    secret = next(row["row_id"] for row in rows if row["reason"] == "secret")
    assert check(store, found, [(secret, "secret")]).reasons == {"empty_answer": 1, "unparsable": 1}
    assert check(store, found, [(secret, "refusal")]).reasons == first.reasons


@pytest.mark.parametrize(
    ("reason", "why", "message"),
    [
        ("unparsable", "x", "no usable conversation"),
        ("near_test_item", "x", "would leak"),
        ("no_such", "x", "no such reason"),
        ("refusal", " ", "--why is empty"),
    ],
)
def test_a_release_that_cannot_be_is_refused_with_the_next_act(reason: str, why: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        release_quarantined(None, reason, why, [])  # type: ignore[arg-type]


def test_appended_rows_leave_the_parts_before_as_they_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.data.ingestion.ingest.PART_ROWS", 20)
    check(store, snapshot(store, [good(i) for i in range(60)]))
    before = {path.name for path in (store.files / "checked").iterdir()}
    check(store, snapshot(store, [good(i) for i in range(70)]))
    after = {path.name for path in (store.files / "checked").iterdir()}
    assert before < after
    assert len(after - before) == 1


def test_the_story_of_a_row_tells_what_came_in_what_became_of_it_and_where_it_is(store: Store) -> None:
    found = dirty(store)
    prepared(store, found)
    (story,) = row_stories(store, "model", f"rows.jsonl:{LINES['mojibake']}")
    assert story.read and "cafÃ©" in story.read[1][1]
    assert "café" in story.now["messages"][1]["content"]
    assert story.history[0][1] == "kept"
    (rejected,) = row_stories(store, "model", f"rows.jsonl:{LINES['empty']}")
    assert (rejected.now["file"], rejected.now["reason"]) == ("quarantine", "empty_answer")
    assert row_stories(store, "model", rejected.row_id[:12]) == [rejected]
    ledger.release_rows(store, "model", [rejected.row_id], "refusal", "because")
    assert row_stories(store, "model", rejected.row_id[:12])[0].releases[0]["why"] == "because"
    with pytest.raises(ConfigError, match="no row is called"):
        row_stories(store, "model", "nowhere:1")
    with pytest.raises(ConfigError, match="no data set"):
        row_stories(store, "other", "a")


def test_explain_answers_on_the_command_line(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    prepared(store, dirty(store))
    where = ["--set", f"store.root={store.root}", "--set", "model.name=model"]
    assert main(["data", "explain", f"rows.jsonl:{LINES['mojibake']}", *where]) == 0
    text = capfd.readouterr().out
    assert "repaired" in text and "café" in text
    assert main(["data", "explain", "nowhere:1", *where, "--json"]) == 2


def test_the_parts_give_the_same_whatever_works_on_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.data.ingestion.ingest.PART_ROWS", 20)
    found = dirty(store)
    pooled = check(store, found)
    monkeypatch.setattr("tasks.runtime.partitions.free_cores", lambda: 1)
    alone = validate(store, found, Checks(RulesSpec(), ContractSpec(max_quarantine_rate=0.5)), force=True)
    assert alone == pooled


# --- drift ----------------------------------------------------------------------------------------------------


def test_drift_is_zero_for_the_same_batch_and_named_for_another(store: Store) -> None:
    one = profile({"prompt_chars": [1, 2, 3], "completion_chars": [5]}, {"source": {"a": 3}, "language": {"en": 3}}, {})
    two = profile({"prompt_chars": [7, 8, 9], "completion_chars": [5]}, {"source": {"a": 3}, "language": {"zh": 3}}, {})
    assert set(drift(one, one).values()) == {0.0}
    moved = drift(two, one)
    assert (moved["ks_prompt_chars"], moved["ks_completion_chars"], moved["kl_source"]) == (1.0, 0.0, 0.0)
    assert moved["kl_language"] == pytest.approx(7 / 8 * 1.9459101 - 1 / 8 * 1.9459101)
    assert ks_distance([], [1.0]) == 0.0
    assert divergence({}, {}) == 0.0


def test_a_batch_that_moved_away_is_a_warning_and_copies_stop_the_run(store: Store) -> None:
    first = check(store, snapshot(store, [good(i) for i in range(60)]))
    longer = [{**good(i), "prompt": good(i)["prompt"] * 20} for i in range(60)]
    reference = (first.snapshot_id, first.profile)
    result = validate(store, snapshot(store, longer), Checks(RulesSpec(), ContractSpec()), reference=reference)
    assert result.drift.values["ks_prompt_chars"] == 1.0
    failed = [
        item["name"]
        for item in json.loads(store.path(result.contract_result).read_text())["results"]
        if not item["success"]
    ]
    assert failed == ["expect_column_max_to_be_between(length_drift)"]
    with pytest.raises(DataError, match=r"duplicate_rate"):
        check(store, snapshot(store, [good(i % 20) for i in range(60)]))


def test_a_field_of_the_rows_becomes_a_slice_wherever_it_is_nested(store: Store, tmp_path: Path) -> None:
    rows = [good(i) | {"meta": {"tier": ["gold", 3, None, {"a": 1}][i % 4]}} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(source=[str(tmp_path / "rows.jsonl")], slice_field="meta.tier")
    found = prepared(store, ingest_sources(store, data))
    files = [store.path(getattr(found, name)).read_text(encoding="utf-8") for name in ("train", "test")]
    assert {json.loads(line).get("slice") for file in files for line in file.splitlines()} == {"gold", "3", None}
    without = prepared(store, ingest_sources(store, data.model_copy(update={"slice_field": None})))
    assert without.snapshot_id != found.snapshot_id
    assert without.splits == found.splits


def test_a_field_of_the_rows_ties_them_together_and_only_its_hash_is_kept(store: Store, tmp_path: Path) -> None:
    rows = [good(i) | {"patient": {"id": ["P-17 ", "P-17", 17, "17"][i % 4]}} for i in range(40)]
    rows += [good(i) for i in range(40, 60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(source=[str(tmp_path / "rows.jsonl")], cluster_field="patient.id")
    found = prepared(store, ingest_sources(store, data))
    files = [store.path(getattr(found, name)).read_text(encoding="utf-8") for name in SPLITS]
    tied = [{json.loads(line).get("cluster") for line in file.splitlines()} - {None} for file in files]
    assert sum(map(len, tied)) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", name) for names in tied for name in names)
    assert "P-17" not in "".join(files)


def test_a_cluster_field_that_no_row_has_stops_the_run_and_one_that_some_lack_is_told(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [good(i) | ({"patient": i % 5} if i < 30 else {}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(source=[str(tmp_path / "rows.jsonl")], cluster_field="patinet")
    with pytest.raises(DataError, match=r"data\.cluster_field.*none of 40 rows has a value in 'patinet'"):
        ingest_sources(store, data)
    ingest_sources(store, data.model_copy(update={"cluster_field": "patient"}))
    assert "10 of 40 rows have no value in 'patient'" in capfd.readouterr().err


def test_without_a_cluster_field_the_snapshot_has_the_name_it_always_had(store: Store, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", "patient": 1}) + "\n")
    data = DataSpec(source=[str(tmp_path / "rows.jsonl")])
    assert ingest_sources(store, data).id.startswith("f615d965239c")
    assert ingest_sources(store, data.model_copy(update={"cluster_field": "patient"})).id[:12] != "f615d965239c"
