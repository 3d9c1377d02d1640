"""Two runs on one Prefect server never hold the device at once, and the one that waits says so.

Run: pytest tests/pipeline/test_device_lock.py
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.pipeline.device_lock import LIMIT, _any_free, device_slot
from tasks.pipeline.policies import POLICIES
from tests.support.servers import free_port, prefect_on

RUN = """
import sys, time
from pathlib import Path
from prefect import flow
from flows.runner import Call, Stages
from tasks.pipeline.policies import stage
from tasks.pipeline.cache_reasons import Reasons
from tasks.runtime.store import Store

def work(store, seconds: float) -> str:
    began = time.time()
    Path(sys.argv[1], "begun").touch()
    time.sleep(seconds)
    return f"{began} {time.time()}"

task = stage("train")(work)

@flow(result_storage=Path(sys.argv[1]))
def run(seconds: float) -> str:
    store = Store(Path(sys.argv[1]))
    (result,) = Stages(Reasons(store, "m", "t")).together([Call.of("train lora", task, store, seconds)])
    return result

print(run(float(sys.argv[2])))
print(run(float(sys.argv[2])))  # cached: it asks for no slot
"""


def start(place: Path, server: str, seconds: float = 1.0) -> "subprocess.Popen[str]":
    place.mkdir()
    environment = os.environ | {
        "PREFECT_API_URL": server,
        "PREFECT_HOME": str(place / "home"),
        "PYTHONPATH": os.getcwd(),
    }
    environment |= {"PREFECT_LOGGING_LEVEL": "CRITICAL", "HOME": str(place)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", RUN, str(place), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def no_limit(prefect):
    """A server on which nobody has made the limit yet."""
    with get_client(sync_client=True) as client:
        with suppress(ObjectNotFound):
            client.delete_global_concurrency_limit_by_name(LIMIT)
        yield client


def test_a_run_waits_for_the_device_says_so_once_and_gives_it_back(no_limit, prefect, tmp_path):
    @flow
    def hold() -> "subprocess.Popen[str]":
        with device_slot("train qlora"):
            waiting = start(tmp_path / "waiting", prefect)
            line = waiting.stderr.readline()
            assert f"waiting for {LIMIT}, held by {flow_run.name} (train qlora, on " in line
            assert not (tmp_path / "waiting" / "begun").exists()
            return waiting

    out, err = (waiting := hold()).communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert "waiting" not in err
    assert len(set(out.splitlines())) == 1
    assert no_limit.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0


def test_the_slot_of_a_killed_run_is_taken_back_at_once(no_limit, prefect, tmp_path, capfd):
    killed = start(tmp_path / "killed", prefect, seconds=100)
    wait_until((tmp_path / "killed" / "begun").exists)
    killed.kill()
    killed.communicate()
    assert no_limit.read_global_concurrency_limit_by_name(LIMIT).active_slots == 1

    @flow
    def follow() -> int:
        with device_slot("train qlora"):
            return no_limit.read_global_concurrency_limit_by_name(LIMIT).active_slots

    began = time.monotonic()
    assert follow() == 1
    assert time.monotonic() - began < 30  # not the 120 s of the lease
    assert f"{LIMIT} is taken back from" in capfd.readouterr().err
    assert no_limit.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0


def wait_until(done: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_two_runs_share_the_device_one_after_the_other(no_limit, prefect, tmp_path):
    runs = [start(tmp_path / name, prefect) for name in ("a", "b")]
    ends = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    spans = sorted(tuple(map(float, out.splitlines()[0].split())) for out, _ in ends)
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), spans
    limit = no_limit.read_global_concurrency_limit_by_name(LIMIT)
    assert (limit.limit, limit.active_slots) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("leases", ["filesystem", "memory"])  # as our servers keep them, and as others do
def test_a_server_that_dies_and_comes_back_costs_the_run_nothing(tmp_path, leases):
    server, environment = prefect_on(tmp_path, free_port())
    kept = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": f"prefect.server.concurrency.lease_storage.{leases}"}
    server.environment = server.environment | kept
    server.start()
    try:
        run = start(tmp_path / "run", environment["PREFECT_API_URL"], seconds=2)
        wait_until((tmp_path / "run" / "begun").exists)
        server.kill()
        time.sleep(6)  # the stage has ended by now, and its slot is to be given back
        server.start()
        out, err = run.communicate(timeout=120)
        with (
            temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}),
            get_client(sync_client=True) as client,
        ):
            assert client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0
    finally:
        server.kill()
    assert run.returncode == 0, err
    assert len(out.splitlines()) == 2


def test_a_limit_that_another_run_makes_at_the_same_moment_is_taken_as_it_is(no_limit, monkeypatch):
    read = SyncPrefectClient.read_global_concurrency_limit_by_name

    def read_too_early(client: SyncPrefectClient, name: str) -> object:
        try:
            return read(client, name)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=3))
            raise

    monkeypatch.setattr(SyncPrefectClient, "read_global_concurrency_limit_by_name", read_too_early)
    assert _any_free()
    monkeypatch.undo()
    assert no_limit.read_global_concurrency_limit_by_name(LIMIT).limit == 3


def test_a_limit_that_somebody_has_raised_stays_so(no_limit, prefect):
    @flow
    def hold() -> tuple[int, int]:
        with device_slot("first"):
            no_limit.update_global_concurrency_limit(LIMIT, GlobalConcurrencyLimitUpdate(limit=2))
            with device_slot("second"):
                limit = no_limit.read_global_concurrency_limit_by_name(LIMIT)
                return limit.limit, limit.active_slots

    assert hold() == (2, 2)


def test_who_has_no_server_has_nobody_to_share_with(no_limit):
    with temporary_settings({PREFECT_API_URL: None}), device_slot("alone"):
        pass
    with pytest.raises(ObjectNotFound):
        no_limit.read_global_concurrency_limit_by_name(LIMIT)


def test_the_stages_that_load_a_model_onto_the_device_take_a_slot():
    assert {name for name, policy in POLICIES.items() if policy.device} == {
        "init_adapter", "train", "evaluate", "serve_alone", "load_back",
    }  # fmt: skip
