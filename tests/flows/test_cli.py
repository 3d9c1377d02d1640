"""The command: what it imports, how it reports bad input, its exit codes, its one JSON object."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data_contracts.errors import DataError, Problem, WorkerError
from data_contracts.run_spec import StoreSpec
from data_contracts.verdict import GateReport, GateResult
from flows.cli import output as console
from flows.cli.app import main
from flows.cli.output import EXIT_CODES, Outcome, print_outcome, result_stream
from flows.cli.pages.tables import show_gate
from flows.services.doctor import _package
from flows.services.environment import prepare_environment
from flows.services.servers import Server, port_is_free, start_all, stop_all

COMMANDS = [
    "run",
    "watch",
    "plan",
    "data",
    "compare",
    "gate",
    "promote",
    "rollback",
    "history",
    "predict",
    "doctor",
    "init",
]
COMMANDS += ["up", "down", "status", "ui"]
SLOW = {"torch", "prefect", "mlflow", "great_expectations", "pandas", "transformers", "pyarrow", "pydantic"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    # Commands set the environment for their libraries: each test gives it back.
    os.environ.clear()
    os.environ.update(before)


def answer(capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict, str]:
    """(exit code, the JSON object on stdout, stderr)"""
    code = main([*args, "--json"])
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    return code, json.loads(out), err


def written(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


# --- speed --------------------------------------------------------------------------------------------------


def test_help_imports_nothing_slow():
    code = "import sys, flows.cli.app; print(*(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert SLOW.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_takes_json(capfd, command):
    # `data` is three commands; its own is `show`.
    assert main([*([command, "show"] if command == "data" else [command]), "--help"]) == 0
    assert "--json" in capfd.readouterr().out


def test_the_version_is_printed(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == "tunegate 0.1.0\n"
    assert answer(capfd, "--version")[:2] == (0, {"version": "0.1.0"})


# --- bad input ----------------------------------------------------------------------------------------------

STORE = "store.root=elsewhere"


@pytest.mark.parametrize(
    ("args", "kind", "what", "act"),
    [
        (["run", "demoo"], "ConfigError", "no preset is called 'demoo'", "did you mean demo?"),
        (["run", "my.yaml"], "ConfigError", "no such file", "tunegate init my.yaml"),
        (["run", "--set", "train.rnk=8"], "ConfigError", "unknown key 'train.rnk'", "did you mean train.rank?"),
        (["run", "--set", "train.rank"], "ConfigError", "has no `=`", "--set train.rank=8"),
        (["data", "--set", "train.rank=no"], "ConfigError", "train.rank is no", "train.rank=16"),
        (["gate", "demoo", "--model", "models:/m/1"], "ConfigError", "'demoo'", "demo?"),
        (["compare", "--set", STORE], "ConfigError", "holds no finished run", "tunegate run"),
        (["compare", "--set", "train.rank=8"], "ConfigError", "train.rank has no effect here", "leave it out"),
        (["promote", "m", "--override"], "ConfigError", "--override without --reason", "--reason"),
        (["predict", " ", "--model", "models:/m/1"], "ConfigError", "the question is empty", "tunegate predict"),
        (["promote", "m", "--set", STORE], "ConfigError", "there is no store here", "store.root=DIR"),
        (["rollback", "m", "--override"], "ConfigError", "--override without --reason", "--reason"),
        (["rollback", "m", "--set", STORE], "ConfigError", "there is no store here", "store.root=DIR"),
        (["history", "m", "--set", STORE], "ConfigError", "there is no store here", "store.root=DIR"),
        (["predict", "q", "--model", "models:/m/1"], "ConfigError", "there is no store here", "store.root=DIR"),
        (["init", "my.json", "--data", "x"], "ConfigError", "no .yaml ending", "my.json.yaml"),
        (["init", "my.yaml", "--data", "x.jsonl"], "ConfigError", "no such file or folder", ""),
        (["run", "--dry-run", "--set", "data.source=x.jsonl"], "DataError", "no such file or folder", ""),
        (["up", "--mlflow-port", "4200"], "ConfigError", "both servers would use port 4200", "two different ports"),
        (["up", "demoo"], "ConfigError", "no preset is called 'demoo'", "did you mean demo?"),
        (["down", "--set", "train.rank=8"], "ConfigError", "train.rank has no effect here", "leave it out"),
        (["ui", "--mlflow-port", "4200"], "ConfigError", "both servers would use port 4200", "two different ports"),
        (["run", "--bogus"], "UsageError", "No such option: --bogus", ""),
        (["gate"], "UsageError", "Missing option '--model'", ""),
        (
            ["predict", "q", "--model", "m", "--max-new-tokens", "0"],
            "UsageError",
            "should be greater than or equal to 1",
            "",
        ),
        ([], "ConfigError", "no command is given", "--help"),
    ],
)
def test_bad_input_ends_with_2_and_says_what_to_do(capfd, tmp_path, args, kind, what, act):
    code, payload, err = answer(capfd, *args)
    (problem,) = payload["error"]["problems"]
    assert (code, payload["exit_code"], payload["error"]["kind"]) == (2, 2, kind)
    assert what in problem["what"]
    assert act in problem["act"]
    assert what in err
    assert list(tmp_path.iterdir()) == []


def test_every_problem_is_on_stderr_and_stdout_stays_empty(capfd):
    assert main(["run", "--set", "train.rank=0", "--set", "foo=1"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "train.rank is 0" in err
    assert "limit: at least 1" in err
    assert "unknown key 'foo'" in err


def test_text_from_data_is_never_markup(capfd):
    assert main(["run", "[red]x[/nope]"]) == 2
    assert "[red]x[/nope]" in capfd.readouterr().err


# --- failures in a flow -------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def plan(loaded: object) -> None:
        raise error

    monkeypatch.setattr("flows.cli.pages.dry_run.planned_run", plan)


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError(Problem("bad rows")), 2), (WorkerError(Problem("killed")), 4), (KeyboardInterrupt(), 130)],
)
def test_each_kind_of_failure_has_its_exit_code(capfd, monkeypatch, error, code):
    failing(monkeypatch, error)
    assert answer(capfd, "run", "--dry-run")[0] == code


def test_an_interrupted_run_says_that_it_resumes(capfd, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["run", "--dry-run"]) == 130
    assert "the same command again resumes from there" in capfd.readouterr().err


STUBBORN = """
import subprocess, sys, time
import flows.cli.pages.dry_run
from flows.cli.app import main

def plan(loaded):
    try:
        subprocess.run([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], stdout=sys.stderr)
    except KeyboardInterrupt:
        time.sleep(60)

flows.cli.pages.dry_run.planned_run = plan
sys.exit(main(["run", "--dry-run", "--json"]))
"""


def test_ctrl_c_ends_even_what_ignores_the_signal_and_its_children():
    command = [sys.executable, "-c", STUBBORN]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "up\n"
        (child,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == json.loads(out)["exit_code"] == 130
    assert "the same command again resumes from there" in err
    assert not child.is_running()


WITH_A_WORKER = """
import subprocess, sys
import flows.cli.output, flows.cli.pages.dry_run
from flows.cli.app import main

WORKER = '''
import signal, sys, time
def save(number, frame):
    time.sleep(float(sys.argv[1]))
    open("checkpoint", "w").close()
    sys.exit()
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
time.sleep(60)
'''
flows.cli.output._STOP_SECONDS = 0.1
flows.cli.pages.dry_run.planned_run = lambda loaded: subprocess.run([sys.executable, "-c", WORKER, sys.argv[1], "tasks.workers.x"], stdout=2)
main(["run", "--dry-run"])
"""


@pytest.mark.parametrize(("seconds", "presses", "saved"), [("1", 1, True), ("60", 2, False)])
def test_ctrl_c_waits_for_a_worker_and_a_second_one_does_not(tmp_path, seconds, presses, saved):
    command = [sys.executable, "-c", WITH_A_WORKER, seconds]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "up\n"
        (worker,) = psutil.Process(process.pid).children()
        for press in range(presses):
            process.send_signal(signal.SIGINT)
            assert any("Ctrl-C again" in line for line in process.stderr) or press > 0
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert not worker.is_running()
    assert (tmp_path / "checkpoint").exists() == saved


def test_an_unexpected_failure_leaves_one_line_and_a_traceback_in_the_store(capfd, monkeypatch):
    failing(monkeypatch, ZeroDivisionError("oops"))
    code, payload, err = answer(capfd, "run", "--dry-run", "--set", STORE)
    (log,) = Path("elsewhere/store/logs").iterdir()
    assert code == 4
    assert str(log) in payload["error"]["problems"][0]["act"]
    assert "Traceback" not in err
    assert "ZeroDivisionError: oops" in log.read_text()


def test_debug_prints_the_traceback(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNEGATE_DEBUG", "1")
    failing(monkeypatch, ZeroDivisionError("oops"))
    assert main(["run", "--dry-run"]) == 4
    assert "Traceback" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_made_is_an_infrastructure_failure(capfd):
    Path("elsewhere").write_text("a file")
    code, payload, _ = answer(capfd, "data", "smoke", "--set", STORE)
    assert (code, payload["error"]["kind"]) == (4, "StoreError")
    assert "cannot be made" in payload["error"]["problems"][0]["what"]


def test_the_environment_keeps_home_clean_and_what_is_set_wins(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", "/mine")
    prepare_environment(StoreSpec(root="elsewhere"))
    assert os.environ["PREFECT_HOME"] == str(tmp_path / "elsewhere" / "store" / "prefect")
    assert os.environ["MPLCONFIGDIR"] == "/mine"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_a_proxy_is_never_asked_for_a_page_of_this_machine(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intern.example")
    prepare_environment(StoreSpec(root="elsewhere"))
    assert os.environ["NO_PROXY"] == "intern.example,127.0.0.1,localhost"
    assert "127.0.0.1" in os.environ["no_proxy"]


def test_your_prefect_server_keeps_your_profile(monkeypatch):
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    prepare_environment(StoreSpec(root="elsewhere"))
    assert "PREFECT_HOME" not in os.environ


def test_a_verdict_sets_the_exit_code():
    assert EXIT_CODES == {"pass": 0, "fail": 1, "inconclusive": 3}


# --- what leaves the command --------------------------------------------------------------------------------


def test_only_the_json_object_reaches_stdout(capfd):
    with result_stream(as_json=True) as stream:
        sys.stdout.write("a library's chatter")
        subprocess.run([sys.executable, "-c", "print('a worker speaks')"], check=True)
        print_outcome(Outcome({"n": 1}, lambda page: None), stream, as_json=True)
    out, err = capfd.readouterr()
    assert out == '{"n": 1}\n'
    assert "a library's chatter" in err
    assert "a worker speaks" in err


def test_json_has_no_nan_and_no_infinity(capfd):
    console.write_json({"a": float("nan"), "b": [float("inf")], "c": {"d": (1.5,)}}, sys.stdout)
    assert json.loads(capfd.readouterr().out) == {"a": None, "b": [None], "c": {"d": [1.5]}}


def test_a_dry_run_shows_values_with_their_origin_and_writes_nothing(capfd, tmp_path):
    code, payload, _ = answer(capfd, "run", "smoke", "--dry-run", "--set", "train.rank=2", "--set", STORE)
    assert code == 0
    assert payload["spec"]["train"]["rank"] == 2
    assert payload["origins"]["train.rank"] == "--set"
    assert [stage["name"] for stage in payload["stages"]][:4] == ["ingest", "validate", "benchmarks", "curate"]
    assert main(["run", "smoke", "--dry-run"]) == 0
    assert "nothing was run and nothing was written" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_names_the_settings_that_no_arm_reads(capfd):
    arms = ["--set", "train.methods=[full]"]
    payload = answer(capfd, "run", "smoke", "--dry-run", *arms, "--set", "train.target_modules=[q_proj]")[1]
    assert set(payload["without_effect"]) == {"train.rank", "train.alpha", "train.target_modules"}
    assert payload["without_effect"]["train.target_modules"] == "set by --set, and read by lora and qlora only"
    variant = ["--set", "train.variants=[{name: wide, method: lora, settings: {rank: 64}}]"]
    assert answer(capfd, "run", "smoke", "--dry-run", *arms, *variant)[1]["without_effect"] == {}
    assert main(["run", "smoke", "--dry-run", *arms]) == 0
    assert "train.rank       set by smoke.yaml" in capfd.readouterr().out


# --- init ---------------------------------------------------------------------------------------------------


def test_init_writes_a_preset_that_runs_as_it_is(capfd):
    data = written("support.jsonl", [{"instruction": f"how {n}?", "output": f"so {n}"} for n in range(3)])
    code, payload, _ = answer(capfd, "init", "my.yaml", "--data", data, "--name", "support")
    assert (code, payload["formats"], payload["rows"]) == (0, {"support.jsonl": "alpaca"}, {"support.jsonl": 3})
    code, plan, _ = answer(capfd, "run", "my.yaml", "--dry-run")
    assert code == 0
    assert plan["spec"]["data"]["source"] == ["support.jsonl"]
    assert plan["spec"]["model"]["name"] == "support"
    assert plan["spec"]["gates"]["min_retention"] == 0.8


def test_init_shows_how_it_maps_columns_it_knows_by_name(capfd):
    written("tickets.jsonl", [{"id": "1", "Question": "how [bold]?", "Answer": "so", "tags": []}])
    assert main(["init", "my.yaml", "--data", "tickets.jsonl"]) == 0
    out = capfd.readouterr().out
    assert "prompt       <- Question" in out
    assert "how [bold]?" in out
    assert answer(capfd, "run", "my.yaml", "--dry-run")[1]["spec"]["data"]["columns"] == {
        "prompt": "Question",
        "completion": "Answer",
    }


def test_init_asks_for_columns_it_cannot_map_and_writes_nothing(capfd):
    written("odd.jsonl", [{"alpha": "a", "beta": "b"}])
    code, payload, _ = answer(capfd, "init", "my.yaml", "--data", "odd.jsonl")
    (problem,) = payload["error"]["problems"]
    assert (code, payload["error"]["kind"]) == (2, "ConfigError")
    assert "alpha, beta" in problem["what"]
    assert "--set data.columns.prompt=alpha" in problem["act"]
    assert not Path("my.yaml").exists()
    columns = ["--set", "data.columns.prompt=alpha", "--set", "data.columns.completion=beta"]
    assert main(["init", "my.yaml", "--data", "odd.jsonl", *columns]) == 0


def test_init_overwrites_nothing(capfd):
    data = written("a.jsonl", [{"prompt": "p", "completion": "c"}])
    Path("my.yaml").write_text("mine")
    assert answer(capfd, "init", "my.yaml", "--data", data)[0] == 2
    assert Path("my.yaml").read_text() == "mine"


# --- doctor and ui ------------------------------------------------------------------------------------------


def test_doctor_reports_versions_device_and_store(capfd, tmp_path):
    code, payload, _ = answer(capfd, "doctor")
    checks = {check["name"]: check for check in payload["checks"]}
    assert code == (0 if payload["ok"] else 2)
    assert {"Python", "fastapi", "sqlalchemy", "default model", "precision", "threads", "disk", "store"} <= set(checks)
    assert all(check["fix"] for check in payload["checks"] if check["health"] == "bad")
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_how_to_fix_a_version_out_of_bounds():
    check = _package("packaging", "<1")
    assert check.health == "bad"
    assert check.fix == "pip install 'packaging<1'"
    assert _package("no-such-package", ">=1").health == "bad"


def test_a_port_in_use_is_named_and_nothing_starts(capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free(port)
        ports = ["--mlflow-port", str(port), "--prefect-port", str(free_port())]
        code, payload, _ = answer(capfd, "ui", *ports, "--set", STORE)
    (problem,) = payload["error"]["problems"]
    assert (code, payload["error"]["kind"]) == (4, "InfrastructureError")
    assert problem["what"] == f"port {port} is in use"
    assert "--mlflow-port" in problem["act"]
    assert not Path("elsewhere").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_servers_start_answer_and_stop(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    server = Server("Page", port, command, "/", tmp_path / "page.log")
    start_all([server])
    assert server.process is not None
    assert server.process.poll() is None
    stop_all([server])
    assert server.process.poll() is not None
    assert port_is_free(port)


def test_a_server_that_dies_is_reported_and_the_others_are_stopped(tmp_path):
    good_port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(good_port)]
    good = Server("Good", good_port, command, "/", tmp_path / "good.log")
    bad = Server("Bad", free_port(), [sys.executable, "-c", "raise SystemExit('no')"], "/", tmp_path / "bad.log")
    with pytest.raises(Exception, match="Bad did not start: no"):
        start_all([good, bad])
    assert good.process is not None
    assert good.process.poll() is not None


# --- pages --------------------------------------------------------------------------------------------------


def test_gates_are_shown_with_words_as_well_as_colours(capfd):
    gates = [
        GateResult(
            name="a",
            direction="at least",
            threshold=0.8,
            actual=0.9,
            interval=(0.85, 0.95),
            verdict="pass",
            why="[b]kept[/b]",
        ),
        GateResult(
            name="b", direction="at least", threshold=0.8, actual=None, interval=None, verdict="fail", why="no metric"
        ),
    ]
    report = GateReport(gates=gates, off=[], verdict="fail")
    print_outcome(Outcome({}, lambda page: show_gate(report, page)), sys.stdout, as_json=False)
    out = capfd.readouterr().out
    assert "[0.850, 0.950]" in out
    assert "[b]kept[/b]" in out
    assert "verdict: FAIL" in out
