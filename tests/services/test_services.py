"""`tunegate up`, `down`, `status`: what runs unattended, what comes back, what is left behind.

Run: pytest tests/services/test_services.py; with -m slow everything is started for real.
"""

import ast
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from prefect.flows import load_flow_from_entrypoint

from data_contracts.errors import InfrastructureError
from data_contracts.run_spec import RunSpec, StoreSpec
from flows.cli.pages.services import show_status
from flows.services import crashed_runs
from flows.services import deployments as deploy
from flows.services.state import MARK, State, open_here, processes, services_folder, write_services_state
from flows.services.status import Deployed, LastRun, NextRun, Service, Status
from flows.services.supervisor import Program, Supervisor, configuration
from tasks.runtime.console import page
from tasks.runtime.processes import is_worker
from tests.support.servers import Tunegate, free_port

ROOT = Path(__file__).parents[2]


def until(check: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.2)


# --- deployments --------------------------------------------------------------------------------------------


def rendered(**schedule: object) -> dict[str, dict]:
    spec = RunSpec.model_validate({"model": {"name": "mine"}, "schedule": schedule})
    return {found["name"]: found for found in deploy.rendered(spec, Path("/data/project"))}


def test_the_presets_schedule_becomes_the_deployments():
    found = rendered(cron="0 3 * * *", timezone="Europe/Berlin", watch_minutes=7, when_busy="skip")
    assert list(found) == ["retrain", "watch", "gate", "promote"]
    (nightly,) = found["retrain"]["schedules"]
    assert (nightly["cron"], nightly["timezone"]) == ("0 3 * * *", "Europe/Berlin")
    assert nightly["parameters"]["reason"] == "schedule: 0 3 * * *"
    assert found["watch"]["schedules"] == [{"interval": 420}]
    assert found["retrain"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert rendered()["retrain"]["concurrency_limit"]["collision_strategy"] == "ENQUEUE"


def test_without_their_settings_nothing_is_scheduled():
    found = rendered(watch_minutes=None)
    assert [item.get("schedules", []) for item in found.values()] == [[], [], [], []]


def test_each_deployment_has_the_presets_name_and_a_store_that_is_found_from_anywhere():
    found = rendered()
    assert found["retrain"]["parameters"]["spec"]["store"]["root"] == "/data/project/mlruns"
    assert found["promote"]["parameters"]["store"]["root"] == "/data/project/mlruns"
    assert found["promote"]["parameters"]["name"] == "mine"
    assert found["gate"]["parameters"]["model_uri"] == "models:/mine@challenger"
    (step,) = found["watch"]["pull"]
    assert step["prefect.deployments.steps.set_working_directory"] == {"directory": "/data/project"}


@pytest.mark.parametrize("name", ["retrain", "watch", "gate", "promote"])
def test_a_flow_takes_the_parameters_its_deployment_gives(name):
    found = rendered(cron="0 3 * * *")[name]
    scheduled = [item.get("parameters", {}) for item in found.get("schedules", [])]
    for extra in [{}, *scheduled]:
        load_flow_from_entrypoint(found["entrypoint"]).validate_parameters(found["parameters"] | extra)


def test_what_looks_like_a_template_arrives_as_it_was_written():
    prompt = "Dear {{ name }}, {{ $HOME }}"
    spec = RunSpec.model_validate({"data": {"system_prompt": prompt}})
    for found in deploy.rendered(spec, Path("/data")):
        if "spec" in found["parameters"]:
            assert found["parameters"]["spec"]["data"]["system_prompt"] == prompt


def test_deployments_are_applied_again_only_if_a_setting_has_changed():
    now = deploy.deployments_sha256(list(rendered().values()))
    assert now == deploy.deployments_sha256(list(rendered().values()))
    assert now != deploy.deployments_sha256(list(rendered(watch_minutes=6).values()))


# --- runs that were killed ----------------------------------------------------------------------------------


def test_every_flow_reports_that_it_is_alive():
    found = {}
    for path in sorted((ROOT / "flows").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "flow":
                    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
                    found[ast.literal_eval(words["name"])] = words.get("on_running")
    assert found == dict.fromkeys(crashed_runs.FLOWS, "[hold]") | {"retrain": "[hold, notify.run_begins]"}


HOLDER = """
import sys, time
from types import SimpleNamespace
from uuid import UUID
from flows.services.crashed_runs import hold
hold(None, SimpleNamespace(id=UUID(sys.argv[1])), None)
print("up", flush=True)
time.sleep(60)
"""


def test_a_run_is_known_to_be_alive_until_its_process_is_killed(tmp_path):
    run = "00000000-0000-0000-0000-000000000007"
    environment = os.environ | {"PREFECT_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert crashed_runs._is_held(tmp_path, crashed_runs.UUID(run))
        process.kill()
        process.wait()
    assert not crashed_runs._is_held(tmp_path, crashed_runs.UUID(run))
    assert list((tmp_path / "at_work").iterdir()) == []


# --- supervisord --------------------------------------------------------------------------------------------


@pytest.fixture
def odd_folder() -> Iterator[Path]:
    # Not in tmp_path: the path of a unix socket is short.
    with tempfile.TemporaryDirectory(prefix="50% of it's mine ") as folder:
        yield Path(folder)


def test_a_program_that_is_killed_comes_back_and_nothing_is_left_in_the_end(odd_folder):
    sleep = [sys.executable, "-c", "import time; time.sleep(600)", "100%", "it's"]
    supervisor = Supervisor(odd_folder)
    supervisor.file.write_text(configuration([Program("sleeper", sleep)]))
    assert supervisor.programs() == {}
    supervisor.start({**os.environ, MARK: str(odd_folder)})
    try:
        assert supervisor.socket.stat().st_mode & 0o777 == 0o700
        supervisor.start_program("sleeper")
        first = supervisor.programs()["sleeper"].pid
        until(lambda: psutil.Process(first).cmdline()[-2:] == ["100%", "it's"])
        until(lambda: supervisor.programs()["sleeper"].state == "RUNNING")
        os.kill(first, signal.SIGKILL)
        until(lambda: supervisor.programs()["sleeper"].pid not in (0, first))
        assert len(processes(odd_folder)) == 2
    finally:
        supervisor.shut_down()
    until(lambda: not processes(odd_folder))
    assert not supervisor.is_up()


def test_a_store_whose_path_is_too_long_for_a_socket_is_reported(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    with pytest.raises(InfrastructureError, match="path is too long"):
        Supervisor(folder).start(dict(os.environ))


def test_a_server_is_used_only_if_its_own_supervisord_is_up(tmp_path):
    store = StoreSpec(root=str(tmp_path))
    folder = services_folder(store)
    folder.mkdir(parents=True)
    with socket.socket() as another:  # a machine that was started again: another store may have the port
        another.bind(("127.0.0.1", 0))
        another.listen()
        write_services_state(folder, State("demo", [], "/", another.getsockname()[1], None))
        assert open_here(store) is None


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def tunegate(tmp_path) -> Tunegate:
    return Tunegate(tmp_path)


def test_where_nothing_is_up_down_and_status_say_so_and_end_well(tunegate):
    assert tunegate("down")[:2] == (0, {"stopped": [], "runs": []})
    code, payload, _ = tunegate("status")
    assert (code, payload["up"], payload["services"], payload["models"]) == (0, False, [], [])
    assert list(tunegate.folder.iterdir()) == []


def test_ports_are_checked_before_anything_is_written(tunegate):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", tunegate.mlflow))
        busy.listen()
        code, payload, _ = tunegate("up", "smoke", *tunegate.ports)
    (problem,) = payload["error"]["problems"]
    assert (code, problem["what"]) == (4, f"port {tunegate.mlflow} is in use")
    assert f"--mlflow-port {tunegate.mlflow + 1}" in problem["act"]
    assert list(tunegate.folder.iterdir()) == []


def test_a_prefect_server_of_your_own_is_not_passed_over_in_silence(tunegate):
    code, payload, _ = tunegate("up", "smoke", PREFECT_API_URL="http://prefect.example/api")
    assert code == 2
    assert "http://prefect.example/api" in payload["error"]["problems"][0]["what"]


def test_the_page_of_status_says_what_is_wrong_and_what_waits(capfd):
    services = [Service("prefect", "silent", 7, "http://127.0.0.1:4200", "2026-01-02T03:04:05+01:00")]
    last = [LastRun("a", "Skipped", "COMPLETED", "2026-01-02T03:04:05+01:00", 3.2)]
    coming = [NextRun("2026-01-03T03:00:00+01:00", "Scheduled"), NextRun("x", "AwaitingConcurrencySlot")]
    found = Status(
        State("[b]my.yaml", [], "/", 4200, 5000),
        services,
        [Deployed("retrain", "0 3 * * *", last, coming)],
        [],
        ["the promotion of [b]m to version 3 is unfinished"],
    )
    assert not found.healthy
    show_status(found, page(sys.stdout))
    out = capfd.readouterr().out
    for text in (
        "silent", "next: tunegate up", "Skipped 2026-01-02 03:04 +01:00, 3 s", "2026-01-03 03:00 +01:00",
        "waits for its turn", "as [b]my.yaml says", "the promotion of [b]m to version 3 is unfinished",
    ):  # fmt: skip
        assert text in out


# --- everything, for real -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Tunegate]:
    """Up with the smoke preset, its training long enough to be met at work."""
    command = Tunegate(tmp_path_factory.mktemp("up"))
    settings = ["train.max_steps=3000", "train.epochs=999", "train.checkpoint_steps=5", "schedule.watch_minutes=60"]
    try:
        code, payload, errors = command(
            "up", "smoke", *command.ports, *(x for setting in settings for x in ("--set", setting))
        )
        assert code == 0, errors
        assert payload["started"] == ["mlflow", "prefect", "worker"]
        yield command
    finally:
        command("down")
        assert processes(services(command)) == []


def services(command: Tunegate) -> Path:
    return command.folder / "mlruns" / "store" / "services"


def pids(command: Tunegate) -> dict[str, int]:
    return {service["name"]: service["pid"] for service in command("status")[1]["services"]}


def deployment(command: Tunegate, name: str) -> dict:
    return command.api(f"/deployments/name/{name}/{name}")


def runs(command: Tunegate, name: str) -> list[dict]:
    return command.api("/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})


def start(command: Tunegate) -> str:
    """A retrain as the browser starts it; answers, once one trains, with the name of the run that does."""
    command.api(f"/deployments/{deployment(command, 'retrain')['id']}/create_flow_run", {})
    training = command.folder / "mlruns" / "store" / "training"
    before = len(list(training.glob("*/checkpoint-*/manifest.json")))
    until(lambda: len(list(training.glob("*/checkpoint-*/manifest.json"))) > before, 400)
    assert any(map(is_worker, processes(services(command))))
    asked = {"flows": {"name": {"any_": ["retrain"]}}, "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    (run,) = command.api("/flow_runs/filter", asked)  # the other one, if a look started one, waits for its turn
    return run["name"]


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestUp:
    def test_everything_answers_on_loopback_only_and_home_stays_clean(self, running):
        code, payload, _ = running("status")
        assert (code, payload["healthy"], [service["state"] for service in payload["services"]]) == (
            0,
            True,
            ["running"] * 3,
        )
        assert [one["name"] for one in payload["deployments"]] == ["retrain", "watch", "gate", "promote"]
        assert payload["deployments"][1]["schedule"] == "every 60 min"
        assert payload["deployments"][1]["next"]
        listening = {
            connection.laddr.ip
            for process in processes(services(running))
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        assert list((running.place / "home").rglob("*")) == []
        assert running.api("/v2/concurrency_limits/tunegate-device")["limit"] == 1

    def test_again_starts_nothing_and_applies_only_what_has_changed(self, running):
        before = pids(running)
        code, payload, errors = running("up")
        assert (code, payload["started"], payload["deployed"]) == (0, [], []), errors
        code, payload, _ = running("up", "--set", "schedule.cron=0 3 * * *", "--set", "schedule.timezone=Europe/Berlin")
        assert (code, payload["started"], payload["deployed"]) == (0, [], ["retrain", "watch", "gate", "promote"])
        assert pids(running) == before
        (schedule,) = deployment(running, "retrain")["schedules"]
        assert schedule["schedule"] == {"cron": "0 3 * * *", "timezone": "Europe/Berlin", "day_or": True}
        until(lambda: running("status")[1]["deployments"][0]["next"])
        (first, *_) = running("status")[1]["deployments"][0]["next"]
        assert first["when"][10:19] == "T03:00:00"
        assert first["when"][-6:] in ("+01:00", "+02:00")

    def test_other_ports_than_what_runs_are_refused(self, running):
        code, payload, _ = running("up", "--prefect-port", str(free_port()))
        assert code == 2
        assert "tunegate down" in payload["error"]["problems"][0]["act"]

    def test_a_command_by_hand_uses_this_server_and_starts_none(self, running):
        code, _, errors = running("data", "smoke")
        assert code == 0, errors
        (run, *_) = running.api("/flow_runs/filter", {"flows": {"name": {"any_": ["prepare-data"]}}})
        assert run["state_name"] == "Completed"

    def test_what_is_killed_comes_back(self, running):
        before = pids(running)
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        until(lambda: running("status")[0] == 4, 20)
        until(lambda: running("status")[0] == 0)
        after = pids(running)
        assert all(after[name] != before[name] for name in before)

    def test_a_power_cut_is_set_right_by_the_next_up(self, running):
        running("up", "smoke", "--set", "train.max_steps=3000", "--set", "train.epochs=999")
        name = start(running)
        for process in processes(services(running)):
            process.kill()
        until(lambda: not processes(services(running)))
        code, payload, _ = running("status")
        assert (code, {service["state"] for service in payload["services"]}) == (4, {"stopped"})
        late = a_day_later(running)
        assert late > 2
        code, payload, errors = running("up")
        assert code == 0, errors
        assert name in payload["reaped"]
        assert payload["late_runs_dropped"] == late - 1
        (run,) = runs(running, name)
        assert run["state_type"] == "CRASHED"
        assert running("status")[0] == 0

    def test_down_lets_a_training_write_its_checkpoint_and_leaves_nothing(self, running):
        name = start(running)
        code, payload, errors = running("down")
        assert (code, payload["stopped"]) == (0, ["mlflow", "prefect", "worker"]), errors
        assert "retrain" in payload["runs"]
        assert "with a checkpoint" in errors
        assert processes(services(running)) == []
        with closing(sqlite3.connect(running.folder / "mlruns" / "store" / "prefect" / "prefect.db")) as database:
            states = database.execute("select state_name from flow_run where name = ?", (name,)).fetchall()
        assert states == [("Crashed",)]
        steps = [int(path.name[11:]) for path in running.folder.glob("mlruns/store/training/*/checkpoint-*")]
        assert any(step % 5 for step in steps), "no checkpoint of the current step"
        assert running("down")[:2] == (0, {"stopped": [], "runs": []})


def a_day_later(command: Tunegate) -> int:
    """Move what is scheduled into yesterday, as if nobody had been there; how many runs of the watch these are."""
    with closing(sqlite3.connect(command.folder / "mlruns" / "store" / "prefect" / "prefect.db")) as database:
        moved = "strftime('%Y-%m-%d %H:%M:%f000', {0}, '-2 day')"
        columns = ("expected_start_time", "next_scheduled_start_time")
        changes = ", ".join(f"{column} = {moved.format(column)}" for column in columns)
        found = database.execute(f"update flow_run set {changes} where state_type = 'SCHEDULED' and auto_scheduled = 1")
        database.commit()
        return found.rowcount
