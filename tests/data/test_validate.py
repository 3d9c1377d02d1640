"""The contract stops a bad batch, says why and where, and never passes an expectation it could not evaluate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_contracts.data_reports import Snapshot, ValidatedData
from data_contracts.data_spec import ContractSpec, DataSpec, RulesSpec
from data_contracts.errors import ConfigError, DataError
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.validation.contract import load_suite, load_suites
from tasks.data.validation.core.drift import OTHER, labels
from tasks.data.validation.validate import Checks, validate
from tasks.runtime.store import Store

SECRET = "Anna Schmidt"
GOOD = [{"prompt": f"question {i} {SECRET}", "completion": f"answer number {i}"} for i in range(40)]
EMPTY = {"prompt": f"{SECRET}?", "completion": ""}


def snapshot(store: Store, rows: list[Any]) -> Snapshot:
    file = store.root / "rows.jsonl"
    store.root.mkdir(exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return ingest_sources(store, DataSpec(source=[str(file)]))


def check(store: Store, rows: Snapshot, contract: ContractSpec, **rules: Any) -> ValidatedData:
    return validate(store, rows, Checks(RulesSpec(**rules), contract))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "root")


def test_a_good_batch_passes_and_rejected_rows_go_to_quarantine(store: Store) -> None:
    result = check(store, snapshot(store, [*GOOD, EMPTY, "{broken"]), ContractSpec())
    assert (result.rows_in, result.rows_kept, result.reasons) == (42, 40, {"empty_answer": 1, "unparsable": 1})
    quarantine = [json.loads(line) for line in store.path(result.quarantine).read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in quarantine] == [(41, "empty_answer"), (42, "unparsable")]
    assert quarantine[1]["raw"] == "{broken"
    assert sum(pq.read_table(store.path(part)).num_rows for part in result.kept) == 40
    outcomes = json.loads(store.path(result.contract_result).read_text())["results"]
    suites = load_suites("instruction_rows", "instruction_batch")
    assert len(outcomes) == sum(len(suite["expectations"]) for suite in suites.values())
    assert all(outcome["success"] for outcome in outcomes)


def test_the_same_input_is_published_under_the_same_name(store: Store) -> None:
    first = check(store, snapshot(store, GOOD), ContractSpec())
    assert check(store, snapshot(store, GOOD), ContractSpec()) == first


def test_a_failed_budget_names_value_limit_reasons_place_and_act(store: Store) -> None:
    with pytest.raises(DataError) as caught:
        check(store, snapshot(store, [*GOOD, *[EMPTY] * 10]), ContractSpec())
    text = str(caught.value)
    for part in (
        "expect_column_mean_to_be_between(quarantined) is 0.2",
        "max_value 0.05",
        "--set contract.max_quarantine_rate=0.2",
        "empty_answer 10 (first: rows.jsonl:41",
    ):
        assert part in text
    assert SECRET not in text
    (file,) = store.files.glob("validated/*/quarantine.jsonl")
    assert str(file) in text
    check(store, snapshot(store, [*GOOD, *[EMPTY] * 10]), ContractSpec(max_quarantine_rate=0.2))


def test_too_few_rows_and_one_answer_to_everything_are_said_together(store: Store) -> None:
    rows = [{"prompt": f"question {i}", "completion": "yes"} for i in range(5)]
    with pytest.raises(DataError) as caught:
        check(store, snapshot(store, rows), ContractSpec())
    assert "expect_table_row_count_to_be_between(rows) is 5" in str(caught.value)
    assert "--set contract.min_rows=5" in str(caught.value)
    assert "expect_column_unique_value_count_to_be_between(answer_hash) is 1" in str(caught.value)


def test_a_failed_warning_is_recorded_and_does_not_stop_the_run(store: Store) -> None:
    labels = [{"prompt": f"question {i}", "completion": ("yes", "no")[i % 2]} for i in range(60)]
    result = check(store, snapshot(store, labels), ContractSpec())
    outcomes = json.loads(store.path(result.contract_result).read_text())["results"]
    assert [(o["name"], o["severity"]) for o in outcomes if not o["success"]] == [
        ("expect_column_proportion_of_unique_values_to_be_between(answer_hash)", "warning")
    ]


def suite(tmp_path: Path, *expectations: dict[str, Any]) -> str:
    budgets = load_suite("instruction_rows")["expectations"][:2]
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"name": "own", "expectations": [*budgets, *expectations]}))
    return str(path)


def test_results_and_data_docs_hold_no_text_of_the_rows(store: Store, tmp_path: Path) -> None:
    kwargs = {"column": "prompt", "regex": "^no row matches this$"}
    own = suite(tmp_path, {"type": "expect_column_values_to_match_regex", "kwargs": kwargs, "severity": "warning"})
    check(store, snapshot(store, GOOD), ContractSpec(suite=own))
    pages = [*store.files.rglob("*.html"), *store.files.rglob("contract.json")]
    assert len(pages) >= 4
    assert not [page for page in pages if SECRET in page.read_text()]


def test_an_expectation_that_cannot_be_evaluated_fails(store: Store, tmp_path: Path) -> None:
    own = suite(tmp_path, {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "price"}})
    with pytest.raises(DataError, match=r"could not be evaluated: .*\"price\".* does not exist"):
        check(store, snapshot(store, GOOD), ContractSpec(suite=own))


def test_a_suite_that_is_missing_broken_or_without_budgets_is_a_configuration_error(
    store: Store, tmp_path: Path
) -> None:
    rows = snapshot(store, GOOD)
    broken, bare = tmp_path / "broken.json", tmp_path / "bare.json"
    broken.write_text("[")
    bare.write_text(json.dumps({"name": "bare", "expectations": []}))
    unknown = suite(tmp_path, {"type": "expect_magic", "kwargs": {}})
    typo = suite(tmp_path / "typo", {"type": "expect_column_mean_to_be_between", "kwargs": {"colum": "turns"}})
    cases = {"nothing": "no such suite", str(broken): "not an expectation suite", str(bare): "max_quarantine_rate"}
    for name, text in (cases | {unknown: "expect_magic", typo: "colum"}).items():
        with pytest.raises(ConfigError, match=text):
            check(store, rows, ContractSpec(suite=name))


def test_a_batch_without_any_kept_row_fails(store: Store) -> None:
    with pytest.raises(DataError, match=r"expect_table_row_count_to_be_between\(rows\) is 0"):
        check(store, snapshot(store, [EMPTY] * 30), ContractSpec(max_quarantine_rate=1.0))


# --- labels ---------------------------------------------------------------------------------------------------

LABELS = ("refund", "lost card", SECRET)


def labelled(first: int, count: int, of: tuple[str, ...] = LABELS) -> list[dict[str, str]]:
    return [{"prompt": f"what is case {i}?", "completion": of[i % len(of)]} for i in range(first, first + count)]


def warnings(store: Store, result: ValidatedData) -> dict[str, Any]:
    outcomes = json.loads(store.path(result.contract_result).read_text())["results"]
    return {item["name"]: item["observed"] for item in outcomes if not item["success"]}


def test_labels_are_counted_by_source_and_kept_as_hashes(store: Store) -> None:
    result = check(store, snapshot(store, labelled(0, 60)), ContractSpec())
    profile = json.loads(store.path(result.profile).read_text())
    assert sorted(profile["labels"]["rows.jsonl"].values()) == [20, 20, 20]
    assert not [file for file in store.files.glob("validated/**/*.json") if SECRET in file.read_text()]
    free = check(store, snapshot(store, GOOD), ContractSpec())
    assert json.loads(store.path(free.profile).read_text())["labels"] == {}


def test_labels_in_other_shares_than_before_are_a_warning_and_so_is_one_that_is_nearly_all(store: Store) -> None:
    first = check(store, snapshot(store, labelled(0, 300)), ContractSpec())
    reference = (first.snapshot_id, first.profile)

    def later(rows: list[dict[str, str]]) -> dict[str, Any]:
        result = validate(store, snapshot(store, rows), Checks(RulesSpec(), ContractSpec()), reference=reference)
        return warnings(store, result)

    drift, share = (f"expect_column_max_to_be_between({name})" for name in ("label_drift", "largest_label_share"))
    assert not {drift, share} & set(later(labelled(300, 300)))
    found = later([*labelled(300, 280, ("refund",)), *labelled(600, 20)])
    assert found[share] == pytest.approx(287 / 300)
    assert found[drift] > 0.25
    free = [{"prompt": f"what is case {i}?", "completion": f"look at page {i} of the book"} for i in range(300)]
    assert later(free)[drift] > 0.25


def test_labels_are_few_short_and_repeated_answers() -> None:
    chars = np.full(1000, 10)
    assert labels(np.arange(1000), chars) == {}
    assert labels(np.arange(1000) % 4, chars + 100) == {}
    assert labels(np.arange(1000) % 4, chars) == dict.fromkeys("0123", 250)
    assert labels(np.array([7] * 95 + [1, 2, 3, 4, 5]), chars[:100]) == {"7": 95, OTHER: 5}
    assert labels(np.array([], dtype=int), chars[:0]) == {}


def test_a_profile_holds_two_hundred_labels_at_most() -> None:
    many = np.repeat(np.arange(210), 20)
    many = np.concatenate([many, np.arange(200).repeat(80)])
    found = labels(many, np.full(len(many), 5))
    assert len(found) == 201
    assert (found[OTHER], sum(found.values())) == (200, len(many))


def test_a_reference_without_labels_is_no_drift_of_labels(store: Store) -> None:
    rows = snapshot(store, labelled(0, 60))
    first = check(store, rows, ContractSpec())
    old = json.loads(store.path(first.profile).read_text())
    del old["labels"]
    (store.files / "old.json").write_text(json.dumps(old))
    reference = (first.snapshot_id, store.ref(store.files / "old.json"))
    result = validate(store, rows, Checks(RulesSpec(), ContractSpec()), reference=reference)
    assert result.drift.values["kl_label"] == 0.0


def test_the_ids_of_all_failing_rows_are_kept(store: Store, tmp_path: Path) -> None:
    kwargs = {"column": "prompt_chars", "max_value": 1}
    own = suite(tmp_path, {"type": "expect_column_values_to_be_between", "kwargs": kwargs, "severity": "warning"})
    result = check(store, snapshot(store, labelled(0, 450)), ContractSpec(suite=own))
    (failed,) = [
        o for o in json.loads(store.path(result.contract_result).read_text())["results"] if "prompt_chars" in o["name"]
    ]
    rows = {i for part in result.kept for i in pq.read_table(store.path(part))["row_id"].to_pylist()}
    assert set(failed["failing_rows"]) == rows
    assert len(rows) == 450
