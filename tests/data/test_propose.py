"""A proposed contract passes on the data it was proposed from, and not on data of another kind.

Run: pytest tests/data/test_propose.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data_contracts.data_reports import ValidatedData
from data_contracts.data_spec import ContractSpec, DataSpec, RulesSpec
from data_contracts.errors import ConfigError, DataError
from flows.cli.app import main
from flows.config.init_spec import WrittenPreset, write_preset
from flows.config.load import load_spec
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.ingestion.sources import find_sources
from tasks.data.validation import propose
from tasks.data.validation.core.drift import OTHER, largest_label_share
from tasks.data.validation.validate import Checks, promised, validate
from tasks.pipeline.policies import stage_key
from tasks.runtime.store import Store

Rows = list[dict[str, str]]
PARTS = ["router", "button", "cable", "screen", "battery", "signal", "engine", "filter", "socket", "antenna", "switch"]
TEILE = ["Kabel", "Knopf", "Filter", "Stecker", "Schalter", "Motor", "Licht", "Akku", "Rahmen", "Regler", "Deckel"]
零件 = ["电缆", "按钮", "过滤器", "插头", "开关", "马达", "灯泡", "电池", "框架", "调节器", "盖子"]
LABELS = ["refund", "lost card", "Anna Schmidt", "exchange rate"]


def english(count: int, first: int = 0, times: int = 1) -> Rows:
    return [
        {
            "prompt": f"What shall I do about the {PARTS[i % 11]} in case {i}? " * times,
            "completion": f"Please look at the {PARTS[i * 7 % 11]} near part {i}, and then press it down firmly. "
            * times,
        }
        for i in range(first, first + count)
    ]


def german(count: int) -> Rows:
    return [
        {
            "prompt": f"Was soll ich mit dem {TEILE[i % 11]} im Fall {i} machen?",
            "completion": f"Bitte sehen Sie nach, ob der {TEILE[i * 7 % 11]} neben Teil {i} richtig sitzt und sauber ist.",
        }
        for i in range(count)
    ]


def chinese(count: int) -> Rows:
    return [
        {
            "prompt": f"第{i}个案例里的{零件[i % 11]}应该怎么处理?",
            "completion": f"请先检查第{i}号位置旁边的{零件[i * 7 % 11]}有没有装好,然后用力把它按下去,最后再重新启动机器。",
        }
        for i in range(count)
    ]


def labelled(count: int, first: int = 0) -> Rows:
    return [
        {"prompt": f"My problem number {i:04} is this.", "completion": LABELS[i % 4]}
        for i in range(first, first + count)
    ]


def mostly_empty(count: int) -> Rows:
    return [row if i % 3 == 0 else {**row, "completion": ""} for i, row in enumerate(english(count))]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(rows: Rows, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return name


def proposal(rows: Rows, *changes: str) -> WrittenPreset:
    return write_preset(Path("my.yaml"), written(rows), None, None, list(changes))


def checked(rows: Rows, before: ValidatedData | None = None) -> tuple[ValidatedData, set[str]]:
    """The data held to the written preset: the result, and the columns whose expectations failed."""
    written(rows)
    spec, store = load_spec("my.yaml", []).spec, Store(Path("root"))
    reference = (before.snapshot_id, before.profile) if before else None
    result = validate(store, ingest_sources(store, spec.data), Checks(spec.rules, spec.contract), reference=reference)
    outcomes = json.loads(store.path(result.contract_result).read_text())["results"]
    return result, {item["name"].partition("(")[2][:-1] for item in outcomes if not item["success"]}


def limits(look: WrittenPreset) -> dict[str, Any]:
    return {item.name: item.value for item in look.proposed.proposals}


# --- the data it was proposed from ----------------------------------------------------------------------------

KINDS = {
    "english": english(60),
    "chinese": chinese(60),
    "two languages": [*english(30), *chinese(30)],
    "three languages": [*english(30), *chinese(30), *german(30)],
    "labels": labelled(240),
    "two thirds empty": mostly_empty(90),
    "mostly copies": english(10) * 6,
    "half very long": [*english(30), *english(30, first=30, times=8)],
    "three rows": english(3),
}


@pytest.mark.parametrize("rows", KINDS.values(), ids=list(KINDS))
def test_the_data_keep_the_contract_that_was_proposed_from_them_without_a_warning(rows: Rows) -> None:
    look = proposal(rows)
    result, failed = checked(rows)
    assert failed == set()
    assert result.reasons == look.proposed.reasons


def test_every_limit_says_what_it_was_proposed_from_and_what_to_do() -> None:
    look = proposal(labelled(240))
    suite = json.loads(Path("my.suite.json").read_text())
    metas = [item["meta"] for item in suite["expectations"]]
    assert all(meta["why"] and meta["act"] for meta in metas)
    proposed = [meta["why"] for meta in metas if "proposed from 240 rows: observed" in meta["why"]]
    names = {"contract.max_quarantine_rate", "contract.min_rows"}  # the settings that the rows suite uses
    in_suite = [item for item in look.proposed.proposals if item.name.startswith("expect_") or item.name in names]
    assert len(proposed) == len(in_suite) >= 7
    preset = Path("my.yaml").read_text()
    assert "contract.max_label_share: proposed from 240 rows: observed the most frequent label is 25.0%" in preset
    assert limits(look)["contract.max_label_share"] == 0.35
    assert limits(look)["contract.min_rows"] == 120


def test_one_or_two_languages_are_proposed_where_they_hold_nearly_all() -> None:
    def languages(rows: Rows) -> list[str]:
        for file in Path().glob("my.*"):
            file.unlink()
        proposal(rows)
        return load_spec("my.yaml", []).spec.rules.languages

    assert languages(english(100)) == ["en"]
    assert languages([*english(150), *german(1)]) == ["en"]
    assert languages([*english(50), *chinese(50)]) == ["en", "zh"]
    assert languages([*english(50), *chinese(50), *german(50)]) == []
    assert languages(labelled(100)) == []  # too short to detect
    assert languages(english(10)) == []  # too few to judge


# --- data of another kind -------------------------------------------------------------------------------------


def test_texts_twice_as_long_warn() -> None:
    proposal(english(60))
    assert {"prompt_chars", "completion_chars"} <= checked(english(60, times=2))[1]


def test_another_language_stops_the_run() -> None:
    proposal(english(60))
    with pytest.raises(DataError, match=r"wrong_language 30 .*the answer is de, allowed: en"):
        checked([*english(60), *german(30)])


def test_another_language_beside_many_warns() -> None:
    rows = [*english(30), *chinese(30), *german(30)]
    proposal(rows)
    spanish = [
        {**row, "completion": f"Por favor mire si la pieza {i} del aparato está bien puesta y limpia por dentro."}
        for i, row in enumerate(rows[:30])
    ]
    assert "language" in checked([*rows, *spanish])[1]


def test_one_label_that_takes_over_warns() -> None:
    proposal(labelled(240))
    first, _ = checked(labelled(240))
    assert checked(labelled(240, first=240), first)[1] == set()
    taken_over = [{**row, "completion": "refund"} if i % 3 else row for i, row in enumerate(labelled(240, first=240))]
    assert {"largest_label_share", "label_drift"} <= checked(taken_over, first)[1]


def test_a_median_between_two_kinds_of_rows_may_move_to_the_other_kind() -> None:
    proposal([*english(101), *english(99, first=101, times=8)])
    assert checked([*english(99), *english(101, first=99, times=8)])[1] == set()


def test_fewer_rows_than_half_stop_the_run() -> None:
    proposal(english(60))
    with pytest.raises(DataError, match=r"expect_table_row_count_to_be_between\(rows\) is 29"):
        checked(english(29))


# --- what init says -------------------------------------------------------------------------------------------


def test_init_says_loudly_what_would_be_quarantined_and_leaves_the_decision_to_you(
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = written(mostly_empty(90))
    assert main(["init", "my.yaml", "--data", data]) == 0
    out = capfd.readouterr().out
    assert "66.7% of these rows would go to quarantine" in out
    assert "empty_answer         60, first: rows.jsonl:2" in out
    assert "contract.max_quarantine_rate=0.717 lets the rest train" in out
    assert main(["init", "strict.yaml", "--data", data, "--set", "contract.max_quarantine_rate=0.1"]) == 0
    assert "contract.max_quarantine_rate=0.1 will stop the run" in capfd.readouterr().out
    written(english(90))
    assert main(["init", "other.yaml", "--data", data]) == 0
    assert "would go to quarantine" not in capfd.readouterr().out


def test_the_json_carries_suite_sample_and_proposals(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "my.yaml", "--data", written(mostly_empty(90)), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["suite"] == "my.suite.json"
    assert shown["sample"] == {"rows": 90, "quarantined": 60 / 90, "reasons": {"empty_answer": 60}}
    budget = next(item for item in shown["proposed"] if item["name"] == "contract.max_quarantine_rate")
    assert (budget["value"], budget["observed"]) == (0.717, "66.7% rejected")


def test_nothing_of_a_label_stands_in_the_suite_or_the_preset() -> None:
    proposal(labelled(240))
    texts = Path("my.yaml").read_text() + Path("my.suite.json").read_text()
    assert not [label for label in LABELS if label in texts]


def test_init_needs_no_great_expectations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "great_expectations", None)
    assert proposal(english(3)).suite == Path("my.suite.json")


def test_a_suite_or_preset_that_is_there_stays_and_nothing_is_written() -> None:
    Path("my.suite.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"my\.suite\.json: is there already"):
        proposal(english(3))
    assert not Path("my.yaml").exists()
    Path("my.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"my\.yaml: is there already[\s\S]*my\.suite\.json: is there already"):
        proposal(english(3))
    assert {Path(name).read_text() for name in ("my.yaml", "my.suite.json")} == {"mine"}


def test_a_preset_that_cannot_be_written_leaves_no_suite_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError

    monkeypatch.setattr("flows.config.init_spec.write_spec", refuse)
    with pytest.raises(ConfigError):
        proposal(english(3))
    assert not Path("my.suite.json").exists()


def test_what_you_set_is_not_proposed() -> None:
    changes = ["contract.min_rows=7", "rules.languages=[]", "contract.suite=instruction_rows"]
    look = proposal(english(60), *changes)
    assert look.suite is None
    assert not Path("my.suite.json").exists()
    assert not {"contract.min_rows", "rules.languages"} & set(limits(look))
    spec = load_spec("my.yaml", []).spec
    assert (spec.contract.min_rows, spec.rules.languages, spec.contract.suite) == (7, [], "instruction_rows")


def test_data_of_which_nothing_is_left_get_a_contract_that_still_asks_for_rows() -> None:
    rows = [{**row, "completion": ""} for row in english(30)]
    assert proposal(rows).rejected == 1.0
    with pytest.raises(DataError, match=r"expect_table_row_count_to_be_between\(rows\) is 0"):
        checked(rows)


def test_unreadable_rows_count_against_the_budget() -> None:
    with Path(written(english(8))).open("a") as file:
        file.write("{broken\n" * 2)
    look = write_preset(Path("my.yaml"), "rows.jsonl", None, None, [])
    assert (look.sample.unreadable, look.rejected) == (2, 0.2)
    assert limits(look)["contract.max_quarantine_rate"] == 0.25


# --- the sample -----------------------------------------------------------------------------------------------


def test_a_sample_is_bounded_and_takes_its_share_of_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propose, "SAMPLE_ROWS", 100)
    data = DataSpec(source=[written(english(900), "a.jsonl"), written(english(300, first=900), "b.jsonl")])
    sources, _ = find_sources(data)
    formats = dict.fromkeys(("a.jsonl", "b.jsonl"), "prompt_completion")
    sample = propose.draw(sources, formats, data)
    assert sample.counts == {"a.jsonl": 900, "b.jsonl": 300}
    assert len({row[0] for row in sample.rows}) == 100
    assert 60 < sum(row[1] == "a.jsonl" for row in sample.rows) < 90
    assert [row[1:3] for row in sample.rows] == sorted(row[1:3] for row in sample.rows)
    assert propose.draw(sources, formats, data) == sample


def test_limits_of_a_sample_are_limits_of_all_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propose, "SAMPLE_ROWS", 100)
    look = proposal(english(400))
    assert limits(look)["contract.min_rows"] == 200
    assert "proposed from 100 of 400 rows" in Path("my.suite.json").read_text()
    assert checked(english(400))[1] == set()


# --- the cache ------------------------------------------------------------------------------------------------


def test_a_changed_suite_or_rule_function_is_checked_again() -> None:
    proposal(english(20))
    Path("rules.py").write_text("def short(prompt, completion):\n    return None\n")
    rules, contract = RulesSpec(function="rules.py:short"), ContractSpec(suite="my.suite.json")

    def key() -> str:
        return stage_key("validate", {"promises": promised(rules, contract)})

    keys = [key()]
    Path("my.suite.json").write_text(Path("my.suite.json").read_text().replace('"mostly": 0.9', '"mostly": 0.8'))
    keys.append(key())
    Path("rules.py").write_text("def short(prompt, completion):\n    return 'no'\n")
    keys.append(key())
    assert len(set(keys)) == 3
    assert key() == keys[-1]


def test_answers_that_are_no_labels_do_not_count_as_the_largest_label() -> None:
    assert largest_label_share({"labels": {"a": {"1": 2, "2": 1, OTHER: 7}, "b": {"1": 1, "2": 3}}}) == 0.75
    assert largest_label_share({"labels": {"a": {"1": 2, "2": 1, OTHER: 7}}}) == 0.2
    assert largest_label_share({"labels": {}}) == 0.0
