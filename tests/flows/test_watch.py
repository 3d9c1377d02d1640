"""A retrain starts for a reason, once, and one at a time. Run: pytest tests/flows/test_watch.py"""

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data_contracts.data_reports import SourceCheck
from data_contracts.data_spec import DataSpec
from data_contracts.errors import GateError
from data_contracts.run_spec import RunSpec, ScheduleSpec
from tasks.data import watermark
from tasks.data.curation.curate import Curation, curate_rows
from tasks.data.freshness import decide_retrain, drifted, reason_to_retrain, still_changing
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.validation.validate import Checks, validate
from tasks.pipeline.run_lock import Holder, hold_run_lock
from tasks.runtime.store import Store

# --- the rule -----------------------------------------------------------------------------------------------


def seen(new: int, known: int = 1000, drift: dict | None = None) -> SourceCheck:
    return SourceCheck(snapshot_id="s", new_rows=new, known_rows=known, drift=drift or {}, drifted=list(drift or {}))


SETTINGS = ScheduleSpec(min_new_rows=20, min_new_share=0.05, drift_window=3, drift_needed=2, max_champion_days=30)


@pytest.mark.parametrize(
    ("look", "looks", "days", "due", "words"),
    [
        (seen(300, known=0), [], None, True, "no run has finished"),
        (seen(0), [True] * 5, 99, False, "nothing new"),
        (seen(50), [False], 1, True, "50 new rows, 5.0% of the 1,000 known"),
        (seen(49), [False], 1, False, "a retrain needs 20 and 5.0%"),
        (seen(19, known=100), [False], 1, False, "19 new rows, 19.0%"),
        (
            seen(40, drift={"ks_prompt_chars": 0.41}),
            [True, False, True],
            1,
            True,
            "in 2 of the last 3 looks (ks_prompt",
        ),
        (seen(40), [True, True, False, False], 1, False, "a retrain needs"),  # the first look has left the window
        (seen(1), [False], 31, True, "the champion is 31 days old, limit 30"),
        (seen(1), [False], None, False, "a retrain needs"),
    ],
)
def test_a_retrain_is_due_for_enough_rows_drift_or_age_and_says_so(look, looks, days, due, words):
    found, why = reason_to_retrain(look, looks, days, SETTINGS)
    assert (found, words in why) == (due, True), why


def test_without_their_settings_drift_and_age_start_nothing():
    off = SETTINGS.model_copy(update={"drift_needed": None, "max_champion_days": None})
    assert not reason_to_retrain(seen(40), [True] * 3, 1000, off)[0]


def test_few_rows_and_a_new_file_are_no_drift():
    found = {"ks_prompt_chars": 0.5, "kl_language": 0.9, "kl_source": 9.0, "kl_label": 0.1}
    assert drifted(29, found, 0.3, 0.5) == []
    assert drifted(30, found, 0.3, 0.5) == ["kl_language", "ks_prompt_chars"]  # 1.8 and 1.7 times their limits


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cron": "0 3 * *"}, "has not five fields"),
        ({"timezone": "Mars/Olympus"}, "no zone"),
        ({"drift_needed": 6}, "6 of the last 5"),
        ({"notify": ["slack"]}, "is not TYPE/NAME"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ScheduleSpec(**settings)


# --- looks at real rows -------------------------------------------------------------------------------------


def write(file: Path, numbers: range, words: int = 4) -> None:
    rows = ({"prompt": f"What is item {n} good for?", "completion": f"Item {n} " + "is good " * words} for n in numbers)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def spec(tmp_path) -> RunSpec:
    (tmp_path / "inbox").mkdir()
    write(tmp_path / "inbox" / "a.jsonl", range(100, 200))
    found = RunSpec(data=DataSpec(source=[str(tmp_path / "inbox")]), store={"root": str(tmp_path / "store")})
    return found.model_copy(update={"schedule": SETTINGS})


def process(store: Store, spec: RunSpec, finished: bool = True):
    """The data stages of a run; a run that was killed later has not finished."""
    snapshot = ingest_sources(store, spec.data)
    validated = validate(store, snapshot, Checks(spec.rules, spec.contract))
    settings = spec.curate.model_copy(update={"near_duplicate_threshold": 1.0})
    curate_rows(store, validated, Curation(settings, spec.model.name))
    if finished:
        watermark.finish(store, spec.model.name, snapshot.id, "run-1")
    return snapshot


def test_only_rows_that_no_finished_run_has_had_are_new(spec, tmp_path):
    store, inbox = Store(tmp_path / "store"), tmp_path / "inbox"
    look, due, _ = decide_retrain(store, spec, ingest_sources(store, spec.data), None)
    assert (look.new_rows, look.known_rows, due) == (100, 0, True)
    process(store, spec, finished=False)
    assert decide_retrain(store, spec, ingest_sources(store, spec.data), None)[0].new_rows == 100, (
        "it was killed before its end"
    )
    process(store, spec)
    assert decide_retrain(store, spec, ingest_sources(store, spec.data), None)[1:] == (
        False,
        "nothing new since the last finished run",
    )
    write(inbox / "b.jsonl", range(197, 204))  # three known ones, four new ones
    with (inbox / "b.jsonl").open("a") as file:
        file.write("not even JSON\n")
    look, due, why = decide_retrain(store, spec, ingest_sources(store, spec.data), None)
    assert (look.new_rows, look.known_rows, due) == (4, 100, False), why
    (inbox / "a.jsonl").unlink()
    assert decide_retrain(store, spec, ingest_sources(store, spec.data), None)[0].new_rows == 4, (
        "rows that leave are no news"
    )


def test_new_rows_unlike_the_old_ones_are_drift_and_a_look_at_the_same_rows_counts_once(spec, tmp_path):
    store, inbox = Store(tmp_path / "store"), tmp_path / "inbox"
    process(store, spec)
    patient = spec.model_copy(update={"schedule": SETTINGS.model_copy(update={"min_new_share": 1.0})})
    write(inbox / "b.jsonl", range(200, 240), words=30)
    for _ in range(3):
        look, due, why = decide_retrain(store, patient, ingest_sources(store, spec.data), None)
        assert look.drifted == ["ks_completion_chars"]
        assert not due, why
    write(inbox / "c.jsonl", range(300, 340), words=30)
    _, due, why = decide_retrain(store, patient, ingest_sources(store, spec.data), None)
    assert due
    assert "drift in 2 of the last 2 looks (ks_completion_chars 1.00)" in why


def test_a_file_that_is_being_written_is_not_read_yet(spec, tmp_path):
    changing = still_changing(spec.data, quiet_seconds=60)
    assert changing is not None
    assert changing.startswith("a.jsonl changed")
    os.utime(tmp_path / "inbox" / "a.jsonl", (time.time() - 61,) * 2)
    assert still_changing(spec.data, quiet_seconds=60) is None


# --- one at a time ------------------------------------------------------------------------------------------


def hold(root: Path, pipe: Connection) -> None:
    with hold_run_lock(
        Store(root), Holder.this_process("11111111-1111-1111-1111-111111111111", "first"), "wait", print
    ):
        pipe.send("ready")
        pipe.poll(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that works in the store until it is asked to end."""
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, its))
    process.start()
    assert mine.poll(30)
    yield process, mine
    if process.is_alive():
        mine.send("end")
    process.join()


SECOND = Holder("2", "second", "here", 1, "now")


def test_a_second_run_skips_if_its_settings_say_so(tmp_path, holder):
    with hold_run_lock(Store(tmp_path), SECOND, "skip", pytest.fail) as lock:
        assert not lock.acquired
        assert lock.busy is not None
        assert lock.busy.name == "first"
        assert lock.busy.process == holder[0].pid


def test_a_second_run_waits_for_the_first_and_says_for_whom(tmp_path, holder):
    lines = []

    def note(line: str) -> None:
        lines.append(line)
        holder[1].send("end")

    with hold_run_lock(Store(tmp_path), SECOND, "wait", note) as lock:
        assert lock.acquired
        assert lock.crashed is None, "the first one ended well"
    assert "waiting for first (process" in lines[0]


def test_a_killed_run_frees_the_store_at_once_and_is_known(tmp_path, holder):
    os.kill(holder[0].pid, signal.SIGKILL)
    holder[0].join()
    with hold_run_lock(Store(tmp_path), SECOND, "skip", pytest.fail) as lock:
        assert lock.acquired
        assert lock.crashed is not None
        assert lock.crashed.flow_run_id == "11111111-1111-1111-1111-111111111111"
    with hold_run_lock(Store(tmp_path), SECOND, "skip", pytest.fail) as lock:
        assert lock.crashed is None, "reported once"


def test_a_run_that_ends_with_an_error_is_not_taken_for_killed(tmp_path):
    with pytest.raises(GateError), hold_run_lock(Store(tmp_path), SECOND, "wait", pytest.fail):
        raise GateError
    with hold_run_lock(Store(tmp_path), SECOND, "wait", pytest.fail) as lock:
        assert lock.acquired
        assert lock.crashed is None
