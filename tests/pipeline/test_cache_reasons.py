"""Why a stage ran, shown by real runs of the data stages: new rows, a setting, code, libraries, a lost result.

Run: pytest tests/pipeline/test_cache_reasons.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from prefect.tasks import Task

from data_contracts.data_reports import FileRef, Report
from data_contracts.reports import AdapterRef, BaseModelRef, Stage
from data_contracts.run_spec import RunSpec
from data_contracts.stage_inputs import RunResult, StageInputs, TrainInputs
from data_contracts.train_spec import TrainSpec
from flows.prepare_data import prepare_data
from tasks.models.base import start_settings
from tasks.pipeline import cache_reasons as reasons
from tasks.pipeline import stages
from tasks.pipeline.cache_reasons import Reasons
from tasks.pipeline.policies import NOT_IDENTITY
from tasks.runtime import fingerprint
from tasks.runtime.store import Store
from tests.support.planted import planted

ROOT = Path(__file__).parents[2]
WRITTEN = {"model": {"name": "m"}, "curate": {"decontaminate": False}}


def write(file: Path, first: int, last: int) -> None:
    with file.open("a") as out:
        for i in range(first, last):
            row = {
                "prompt": f"question {i} about topic {i * 7}",
                "completion": f"answer number {i} is {i * i}, as we know",
            }
            out.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reasons")


@pytest.fixture(scope="module")
def run(place, prefect) -> Callable[..., dict[str, str]]:
    """Run the data stages; answer with each one's status and why."""

    def run(force: bool = False, **changes: dict) -> dict[str, str]:
        settings = WRITTEN | {"data": {"source": [str(place / "rows.jsonl")]}, "store": {"root": str(place / "store")}}
        stages = prepare_data(RunSpec.model_validate({**settings, **changes}), force)[1]
        return {stage.name: f"{stage.status} {stage.why}".strip() for stage in stages}

    return run


def edit(file: Path, more: str) -> None:
    file.write_text(file.read_text() + more)
    fingerprint.read_module.cache_clear()


# The tests from here to the line below are one story, in this order: each begins with the store as the one before left it.


def test_the_first_time_is_said_and_the_second_has_nothing_to_say(place, run):
    write(place / "rows.jsonl", 0, 60)
    assert run() == dict.fromkeys(("ingest", "validate", "curate"), "ran first time")
    assert run() == dict.fromkeys(("ingest", "validate", "curate"), "cached")


def test_new_rows_are_counted(place, run):
    write(place / "rows.jsonl", 60, 67)
    assert run() == {
        "ingest": "ran file:rows.jsonl changed",
        "validate": "ran data changed, the batch before changed",
        "curate": "ran data changed: 7 new rows of 67",
    }


def test_a_changed_setting_is_named_with_both_values_and_only_its_stage_runs(run):
    changed = run(curate={"decontaminate": False, "shingle_words": 4})
    assert changed == {"ingest": "cached", "validate": "cached", "curate": "ran curate.shingle_words 5 -> 4"}
    assert run()["curate"] == "cached"


def test_an_edited_helper_runs_its_stages_and_a_comment_none(run, copy_of_code):
    minhash = copy_of_code / "tasks" / "data" / "curation" / "core" / "minhash.py"
    edit(minhash, "\n# why\n\n")
    edit(copy_of_code / "tasks" / "evaluation" / "core" / "stats.py", "\nUNUSED = 1\n")  # no helper of the data stages
    assert run() == dict.fromkeys(("ingest", "validate", "curate"), "cached")
    edit(minhash, "\nUNUSED = 1\n")
    assert run() == {
        "ingest": "cached",
        "validate": "cached",
        "curate": "ran code changed: tasks.data.curation.core.minhash",
    }
    edit(copy_of_code / "data_contracts" / "rows.py", "\nUNUSED = 1\n")
    assert run() == dict.fromkeys(("ingest", "validate", "curate"), "ran code changed: data_contracts.rows")


def test_what_a_failure_is_called_shapes_no_result(run, copy_of_code):
    edit(copy_of_code / "data_contracts" / "retry_table.py", "\nUNUSED = 1\n")
    assert set(run().values()) == {"cached"}


def test_a_lost_result_and_a_forced_run_are_reasons(place, run):
    run()
    for file in (place / "store" / "store" / "results").glob("curate-*"):
        file.unlink()
    assert run() == {"ingest": "cached", "validate": "cached", "curate": "ran its cached result is gone"}
    assert set(run(force=True).values()) == {"ran forced"}


def test_what_an_earlier_stage_made_otherwise_runs_the_next_ones_too(run):
    run()
    rules = {"custom": [{"name": "no_seven", "forbidden": "7"}]}
    assert run(rules=rules, contract={"max_quarantine_rate": 0.9}) == {
        "ingest": "cached",
        "validate": "ran contract.max_quarantine_rate 0.05 -> 0.9, rules.custom changed",
        "curate": "ran data changed",
    }


# ------------------------------------------------------------------------------------------------------------


BASE = BaseModelRef(name="tiny", digest="b", path="bases/tiny", note="", revision=None, stops=[], chat_template=None)


def training(**changes: object) -> dict:
    """Arguments of the training stage."""
    same = {
        "method": "lora",
        "seed": 17,
        "base": BASE,
        "step0": AdapterRef(folder="a", sha256="1"),
        "precision": "auto",
    }
    rows = {"rows": FileRef(path="r", sha256="1"), "validation": FileRef(path="v", sha256="1"), "settings": TrainSpec()}
    return {"inputs": TrainInputs.model_validate({**same, **rows, **changes})}


def why(place: Path, **changes: object) -> str:
    reasons_kept = Reasons(Store(place), "m", "retrain")
    reasons_kept.keep("train", "train lora", training())
    return reasons_kept.why("train", "train lora", training(**changes))


def test_training_names_its_settings_before_what_follows_from_others(tmp_path):
    assert why(tmp_path) == reasons.GONE
    assert why(tmp_path, settings=TrainSpec(learning_rate=4e-3)) == "train.learning_rate 0.0002 -> 0.004"
    assert why(tmp_path, rows=FileRef(path="r", sha256="2"), validation=FileRef(path="v", sha256="2")) == "data changed"
    assert (
        why(tmp_path, step0=AdapterRef(folder="b", sha256="2"), seed=18)
        == "train.seeds 17 -> 18, start adapter changed"
    )
    assert why(tmp_path, rows=FileRef(path="elsewhere", sha256="1"), settings=TrainSpec(threads=1)) == reasons.GONE


def test_a_start_adapter_names_the_setting_it_is_made_from(tmp_path):
    def arguments(rank: int) -> dict:
        return {"base": BASE, "settings": start_settings("lora", 17, TrainSpec(rank=rank), "fp32")}

    kept = Reasons(Store(tmp_path), "m", "retrain")
    kept.keep("init_adapter", "init_adapter", arguments(16))
    assert kept.why("init_adapter", "init_adapter", arguments(8)) == "train.rank 16 -> 8"


def test_moved_modules_are_one_reason(tmp_path):
    kept = Reasons(Store(tmp_path), "m", "retrain")
    kept.keep("gate", "gate", {})
    (file,) = tmp_path.rglob("gate.json")
    file.write_text(file.read_text().replace('"code ', '"code old.'))
    assert kept.why("gate", "gate", {}) == "code changed: every module has another name"


def test_at_most_three_differences_are_named_one_by_one(tmp_path):
    settings = TrainSpec(learning_rate=4e-3, rank=8, alpha=16, epochs=7, dropout=0.2)
    assert why(tmp_path, settings=settings).endswith(" and 2 more")
    assert why(tmp_path, settings=settings).count("->") == 3


def recording(root: Path, spec: RunSpec, **changes: object) -> dict:
    """Arguments of the stage that records a run."""
    found = planted(root)
    values = {name: getattr(found, name) for name in ("base", "dataset", "arms", "evaluations", "comparison", "gate")}
    result = RunResult(**values, candidate=found.arms[0], champion="m version 1")
    return {"spec": spec, "result": result.model_copy(update=changes)}


def test_of_a_runs_result_every_part_counts_as_an_argument_of_its_own(tmp_path):
    spec, elsewhere = RunSpec(), {"folder": "elsewhere"}
    stored = Reasons(Store(tmp_path), "m", "retrain")
    stored.keep("record", "record", recording(tmp_path, spec))

    def why(spec: RunSpec = spec, **changes: object) -> str:
        return stored.why("record", "record", recording(tmp_path, spec, **changes))

    found = planted(tmp_path)
    moved = [arm.model_copy(update={"adapter": arm.adapter.model_copy(update=elsewhere)}) for arm in found.arms]
    assert why(arms=moved) == reasons.GONE, "files, adapters and bases count by their content"
    assert why(arms=[]) == "adapter changed"
    assert why(champion="m version 2") == "champion m version 1 -> m version 2"
    assert (
        why(gate=found.gate.model_copy(update={"verdict": "fail"}), evaluations=[]) == "scores changed, verdict changed"
    )
    assert why(RunSpec(train=TrainSpec(learning_rate=4e-3))) == "train.learning_rate 0.0002 -> 0.004"


def test_another_version_of_a_library_is_shown_with_both(tmp_path, monkeypatch):
    reasons_kept = Reasons(Store(tmp_path), "m", "retrain")
    monkeypatch.setattr(reasons, "library_versions", lambda names: dict.fromkeys(names, "2.12"))
    reasons_kept.keep("train", "train lora", training())
    monkeypatch.setattr(reasons, "library_versions", lambda names: dict.fromkeys(names, "2.12") | {"torch": "2.13"})
    assert reasons_kept.why("train", "train lora", training()) == "torch 2.12 -> 2.13"


def test_what_was_kept_and_cannot_be_read_is_like_the_first_time(tmp_path):
    reasons_kept = Reasons(Store(tmp_path), "a/b", "retrain")
    reasons_kept.keep("train", "train lora", training())
    (file,) = (tmp_path / "store" / "keys").rglob("*.json")
    assert file.relative_to(tmp_path / "store" / "keys").as_posix() == "a%2Fb/retrain/train lora.json"
    file.write_text("{")
    assert reasons_kept.why("train", "train lora", training()) == reasons.FIRST


def test_every_argument_of_a_stage_that_earlier_ones_make_has_a_word():
    made, given = set(), set()
    for task in (task for task in vars(stages).values() if isinstance(task, Task)):
        for name, annotation in one_by_one(task.fn).items():
            (made if has_report(annotation) else given).add(name)
    assert made - {"return", *NOT_IDENTITY} == reasons._MADE.keys()
    assert reasons._GIVEN.keys() <= given


def one_by_one(function: Callable[..., object]) -> dict[str, object]:
    """The annotations of a stage's parameters, those of a group by its fields."""
    found: dict[str, object] = {}
    for name, annotation in get_type_hints(function).items():
        is_group = isinstance(annotation, type) and issubclass(annotation, StageInputs)
        own = get_type_hints(annotation) if is_group else {name: annotation}
        found |= {field: hint for field, hint in own.items() if field != "model_config"}
    return found


def has_report(annotation: object) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, Report):
        return True
    return any(map(has_report, get_args(annotation)))


def test_a_reason_and_a_report_written_before_there_were_any_go_together():
    assert Stage.model_validate({"name": "ingest", "status": "ran", "seconds": 1.0}).why == ""
