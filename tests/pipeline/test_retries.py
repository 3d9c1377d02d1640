"""What may pass is tried again by the installed Prefect, what cannot is tried once; each failure is a real one.

Run: pytest tests/pipeline/test_retries.py
"""

import http.server
import inspect
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect import flow
from prefect.tasks import Task

from data_contracts.errors import (
    ConfigError,
    DataError,
    GateError,
    InfrastructureError,
    Problem,
    StoreError,
    TransientError,
    TunegateError,
)
from data_contracts.jobs import Job
from flows.runner import Stages
from tasks.pipeline import policies, stages
from tasks.pipeline.cache_reasons import Reasons
from tasks.pipeline.policies import stage
from tasks.runtime.processes import run_worker
from tasks.runtime.store import Store

TRIES = 4
pytestmark = pytest.mark.usefixtures("prefect")


class Stage:
    """A stage of the real kind around a function, run in a real flow; `calls` counts its tries."""

    def __init__(self, place: Path, function: Callable[[], object], wait: float = 0.0, **options: object) -> None:
        self.place, self.calls = place, 0

        def promote(store: Store) -> str:
            self.calls += 1
            return str(function())

        # The policy as it is; only the waiting is shorter.
        self.task = stage("promote")(promote).with_options(retry_delay_seconds=wait, **options)

    def run(self) -> str:
        store = Store(self.place)

        @flow(result_storage=self.place)
        def trial() -> str:
            return Stages(Reasons(store, "m", "trial")).run(self.task, store)

        return str(trial())

    def error(self) -> TunegateError:
        with pytest.raises(TunegateError) as caught:
            self.run()
        return caught.value


@contextmanager
def answering(statuses: list[int], port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """A server that answers with these statuses, the last one for ever: its address, and the requests it got."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = statuses[min(len(asked), len(statuses) - 1)]
            asked.append(self.path)
            body = b'{"experiment": {"experiment_id": "7", "name": "found"}}' if status == 200 else b"geheim, no"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def ask_mlflow(monkeypatch) -> Callable[[str], str]:
    """Ask a tracking server for an experiment by MLflow's own client, whose own retries are off."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    from mlflow import MlflowClient

    return lambda address: str(MlflowClient(tracking_uri=address).get_experiment("7").name)


# --- the condition is really called -------------------------------------------------------------------------


def test_every_stage_has_a_condition_that_prefect_calls():
    tasks = [task for task in vars(stages).values() if isinstance(task, Task)]
    assert len(tasks) > 10
    for task in tasks:
        assert inspect.isfunction(task.retry_condition_fn), f"Prefect would never try {task.name} again"
        assert (task.retries, task.retry_delay_seconds) == (TRIES - 1, [2.0, 15.0, 60.0])
        assert task.retry_jitter_factor == 0.5


def test_prefect_asks_the_table_after_each_failed_try(tmp_path, monkeypatch):
    asked = []
    is_transient = policies.is_transient
    monkeypatch.setattr(policies, "is_transient", lambda error: asked.append(error) or is_transient(error))
    failing = Stage(tmp_path, lambda: Path("/nowhere").read_text() if failing.calls > 2 else break_off())
    with pytest.raises(FileNotFoundError):  # a bug stays what it is
        failing.run()
    assert failing.calls == 3
    assert [type(error) for error in asked] == [TransientError, TransientError, FileNotFoundError]


def break_off() -> None:
    raise ConnectionResetError("gone")


# --- tried again --------------------------------------------------------------------------------------------


def test_a_server_that_is_busy_twice_is_asked_three_times(tmp_path, ask_mlflow, capfd):
    with answering([503, 503, 200]) as (address, asked):
        trial = Stage(tmp_path, lambda: ask_mlflow(address))
        assert trial.run() == "found"
    assert (trial.calls, len(asked)) == (3, 3)
    said = capfd.readouterr().err
    assert "the network failed" in said
    assert "that was try 2 of 4" in said


def test_a_server_that_comes_after_a_while_is_found(tmp_path, ask_mlflow):
    port = free_port()
    comes = threading.Event()

    def serve() -> None:
        time.sleep(1.0)
        with answering([200], port):
            comes.wait(60)

    server = threading.Thread(target=serve)
    server.start()
    trial = Stage(tmp_path, lambda: ask_mlflow(f"http://127.0.0.1:{port}"), wait=0.7)
    try:
        assert trial.run() == "found"
    finally:
        comes.set()
        server.join()
    assert 1 < trial.calls <= TRIES


def test_a_server_that_stays_away_is_tried_four_times_and_the_error_says_so(tmp_path, ask_mlflow):
    trial = Stage(tmp_path, lambda: ask_mlflow(f"http://127.0.0.1:{free_port()}"))
    error = trial.error()
    assert type(error) is TransientError
    assert trial.calls == TRIES
    assert error.problems[0].what.endswith("(tried 4 times)")
    assert "check the address" in error.problems[0].act


def test_a_locked_database_is_waited_for(tmp_path):
    file = tmp_path / "some.db"
    holder = sqlite3.connect(file, check_same_thread=False)
    holder.execute("create table t (x)")
    holder.execute("begin exclusive")

    def write() -> str:
        connection = sqlite3.connect(file, timeout=0.05)
        try:
            with connection:
                connection.execute("insert into t values (1)")
        finally:
            holder.close()  # released before the next try
        return "written"

    trial = Stage(tmp_path, write)
    assert trial.run() == "written"
    assert trial.calls == 2


@pytest.fixture
def worker(tmp_path, monkeypatch) -> Callable[[str], dict]:
    """A real worker process that does what its spec says."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")

    def run(what: str) -> dict:
        text = "from data_contracts.jobs import Job\nfrom tasks.runtime.workers.harness import main\n\n\ndef work(job, out):\n"
        text += (
            "    print('begun', file=(out / 'tries').open('a'))\n"
            + f"    {what}\n    return {{}}\n\n\nmain(work, Job)\n"
        )
        (tmp_path / "some_worker.py").write_text(text)
        return run_worker("some_worker", Job(), tmp_path / "out")

    return run


def tries(tmp_path: Path) -> int:
    return len((tmp_path / "out" / "tries").read_text().splitlines())


def test_a_worker_that_a_signal_kills_is_started_four_times_and_no_more(tmp_path, worker):
    trial = Stage(tmp_path, lambda: worker("import os; os.kill(os.getpid(), 9)"))
    error = trial.error()
    assert type(error) is TransientError
    assert error.problems[0].what == "killed by signal 9 (tried 4 times)"
    assert tries(tmp_path) == TRIES


def test_a_network_failure_within_a_worker_is_tried_again(tmp_path, worker):
    what = "import requests; len((out / 'tries').read_text()) > 10 or requests.get('http://127.0.0.1:9')"
    trial = Stage(tmp_path, lambda: worker(what))
    assert trial.run() == "{}"
    assert tries(tmp_path) == 2


# --- tried once ---------------------------------------------------------------------------------------------


def test_without_a_login_a_server_is_asked_once_and_the_error_says_what_to_set(tmp_path, ask_mlflow):
    with answering([401]) as (address, asked):
        trial = Stage(tmp_path, lambda: ask_mlflow(address.replace("//", "//me:geheim@")))
        error = trial.error()
    assert (type(error), trial.calls, len(asked)) == (ConfigError, 1, 1)
    assert "MLFLOW_TRACKING_TOKEN" in error.problems[0].act


def test_a_secret_does_not_get_into_the_error_nor_behind_it(tmp_path):
    import requests

    with answering([403]) as (address, _):
        url = address.replace("//", "//me:geheim@") + "/x?token=geheim"
        error = Stage(tmp_path, lambda: requests.get(url, timeout=5).raise_for_status()).error()
    link: BaseException | None = error
    while link is not None:
        assert "geheim" not in str(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def test_what_is_not_there_is_asked_once(tmp_path, ask_mlflow):
    with answering([404]) as (address, asked):
        assert type(Stage(tmp_path, lambda: ask_mlflow(address)).error()) is ConfigError
    assert len(asked) == 1


def test_a_full_disk_stops_at_once_and_names_the_place(tmp_path):
    def write() -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    trial = Stage(tmp_path, write)
    error = trial.error()
    assert (type(error), trial.calls) == (StoreError, 1)
    assert error.problems[0].where == str(tmp_path)
    assert "MB free there" in error.problems[0].limit


def test_a_full_disk_stops_a_worker_at_once(tmp_path, worker):
    error = Stage(tmp_path, lambda: worker("open('/dev/full', 'wb', buffering=0).write(b'x')")).error()
    assert type(error) is StoreError
    assert error.problems[0].where == str(tmp_path / "out")
    assert tries(tmp_path) == 1
    assert "No space left" in (tmp_path / "out" / "worker.log").read_text()


@pytest.mark.parametrize(
    ("kind", "where"),
    [("ConfigError", "step 6: the loss is nan"), ("DataError", "the contract"), ("GateError", "a gate")],
)
def test_nan_contract_and_gate_stop_at_once(tmp_path, worker, kind, where):
    what = f"from data_contracts import errors; raise errors.{kind}(errors.Problem({where!r}))"
    error = Stage(tmp_path, lambda: worker(what)).error()
    assert type(error) is {"ConfigError": ConfigError, "DataError": DataError, "GateError": GateError}[kind]
    assert error.problems == (Problem(where),)
    assert tries(tmp_path) == 1


def test_a_stage_out_of_time_stops_and_says_how_to_go_on(tmp_path):
    trial = Stage(tmp_path, lambda: [time.sleep(0.05) for _ in range(100)], timeout_seconds=0.2)
    error = trial.error()
    assert (type(error), trial.calls) == (InfrastructureError, 1)
    assert "resumes from there" in error.problems[0].act
