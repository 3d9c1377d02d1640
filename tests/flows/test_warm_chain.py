"""A warm-started retrain through the command: smoke, then new rows, killed on the way, again, and forced.

Four runs of the smoke preset, minutes each next to other work: `pytest -m slow tests/flows/test_warm_chain.py`.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data_contracts.run_spec import StoreSpec
from tasks.release.registry import resolve
from tasks.runtime.mlflow_client import connect
from tests.support.servers import COMMAND, prefect_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SETTINGS = ["train.warm_start=champion", "train.max_steps=40", "train.epochs=10", "train.dropout=0.1"]
FEWER = "data.packages=[json, shutil, logging, argparse, textwrap, pathlib]"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("warm-chain")


@pytest.fixture(scope="module")
def environment(place):
    with prefect_server(place) as found:
        yield found


@pytest.fixture(scope="module")
def command(place):
    def line(*changes: str) -> list[str]:
        named = [
            part for change in (*SETTINGS, f"store.root={place / 'store'}", *changes) for part in ("--set", change)
        ]
        return [*COMMAND, "run", "smoke", "--json", *named]

    return line


@pytest.fixture(scope="module")
def tunegate(place, environment):
    def run(line: list[str]) -> dict:
        done = subprocess.run(line, env=environment, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1, 3), done.stderr
        return {**json.loads(done.stdout), "stderr": done.stderr}

    return run


@pytest.fixture(scope="module")
def first(tunegate, command) -> dict:
    found = tunegate(command(FEWER))
    assert found["verdict"] == "pass"
    return found


@pytest.fixture(scope="module")
def second(first, tunegate, command, place, environment) -> dict:
    """With new rows, through a worker and a command that are killed."""
    with (place / "killed.log").open("w") as log:
        running = subprocess.Popen(command(), env=environment, cwd=place, stdout=log, stderr=log)
        for kill_worker in (True, False):
            os.kill(_worker(running) if kill_worker else running.pid, signal.SIGKILL)
            time.sleep(0.5)
        running.wait()
    return tunegate(command())


def _worker(running: "subprocess.Popen[bytes]") -> int:
    """The training worker below a command, once it has written a checkpoint."""
    import psutil

    while running.poll() is None:
        for child in psutil.Process(running.pid).children(recursive=True):
            line = child.cmdline()
            if "tasks.training.workers.train_adapter" in line and list(
                Path(line[-1]).glob("checkpoint-*/manifest.json")
            ):
                return child.pid
        time.sleep(0.02)
    raise AssertionError("the command ended before a worker could be killed")


@pytest.fixture(scope="module")
def forced(second, tunegate, command) -> dict:
    """The same, undisturbed: every stage from scratch."""
    return tunegate([*command(), "--force"])


def test_the_first_run_finds_no_champion_and_says_so(first):
    assert "from scratch: tunegate-smoke has no champion yet" in first["stderr"]
    assert {arm["start"]["note"] for arm in first["arms"]} == {"tunegate-smoke has no champion yet"}


def test_both_arms_go_on_from_the_champions_very_bytes(first, second):
    lora, qlora = second["arms"]
    champion = first["arms"][1]["adapter_sha256"]
    assert lora["step0_sha256"] == qlora["step0_sha256"] == champion
    assert lora["start"] == qlora["start"]


def test_they_train_on_all_new_rows_and_as_many_old_ones(first, second, place):
    def rows(file: dict) -> set[str]:
        lines = (place / "store" / "store" / file["path"]).read_text().splitlines()
        return {json.loads(line)["row_id"] for line in lines}

    before, here = rows(first["snapshot"]["train"]), rows(second["snapshot"]["train"])
    start = second["arms"][0]["start"]
    assert here - before and here - before <= rows(start["rows"]) <= here
    assert (start["new_rows"], start["old_rows"]) == (len(here - before), len(here & before))
    assert len(rows(start["rows"])) == start["new_rows"] + start["replayed_rows"] == 2 * start["new_rows"]
    assert f"on {len(here - before)} new rows and {len(here - before)} of {len(here & before)} old" in second["stderr"]


def test_a_killed_warm_start_ends_with_the_adapter_of_an_undisturbed_one(second, forced):
    assert second["arms"][0]["resumed_from_step"] > 0
    assert [arm["resumed_from_step"] for arm in forced["arms"]] == [0, 0]
    assert [arm["adapter_sha256"] for arm in forced["arms"]] == [arm["adapter_sha256"] for arm in second["arms"]]
    assert forced["arms"][0]["start"] == second["arms"][0]["start"]


def test_the_same_command_again_does_nothing_though_its_model_is_champion_by_now(forced, tunegate, command):
    again = tunegate(command())
    assert {stage["status"] for stage in again["stages"]} <= {"cached", "skipped"}
    assert again["model"]["version"] == forced["model"]["version"]


def test_report_registry_and_mlflow_say_where_it_started(first, second, place):
    from_champion = f"from tunegate-smoke version 1, on {second['arms'][0]['start']['new_rows']} new rows"
    assert f"qlora resumes {from_champion}" in Path(second["html"]).read_text()
    store = StoreSpec(root=str(place / "store"))
    assert resolve(store, "models:/tunegate-smoke/2").started_from == "1"
    assert resolve(store, "models:/tunegate-smoke/1").started_from is None
    run = connect(store).get_run(second["arms"][1]["mlflow_run_id"])
    assert run.data.tags["tunegate.started_from"] == "1"
    assert run.data.metrics["replayed_rows"] == second["arms"][1]["start"]["replayed_rows"]
    digests = {item.dataset.digest for item in run.inputs.dataset_inputs}
    assert second["arms"][1]["start"]["rows"]["sha256"][:32] in digests
