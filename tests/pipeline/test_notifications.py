"""Messages reach a webhook, and artifacts Prefect's page: against a real Prefect server and a real local webhook.

A toy flow stands for the retrain, with the retrain's own hooks and with real stages; test_chain.py has the real one.
Run: pytest tests/pipeline/test_notifications.py
"""

import io
import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from markdown_it import MarkdownIt
from prefect import Task, flow
from prefect.artifacts import update_progress_artifact
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from data_contracts.errors import DataError, Problem, WorkerError
from data_contracts.releases import Move, Moved
from data_contracts.reports import ModelVersion, RunReport
from data_contracts.run_spec import RunSpec, StoreSpec
from data_contracts.verdict import GateReport, GateResult
from flows.retrain import retrain_flow
from flows.runner import Stages
from tasks.pipeline import notifications
from tasks.pipeline import notifications as notify
from tasks.pipeline.policies import stage
from tasks.reporting import links
from tasks.reporting import prefect_artifacts as artifacts
from tasks.runtime.store import Store
from tests.support.planted import planted, saved
from tests.support.webhook import SECRET, save_block, shown, webhook

pytestmark = pytest.mark.usefixtures("prefect")
MISSING = "slack-webhook/no-such-team"


@pytest.fixture(scope="module")
def patience(prefect) -> Iterator[None]:
    """A second try comes at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notify, "_FIRST_WAIT_SECONDS", 0.01)
        yield


@pytest.fixture(scope="module")
def team(patience) -> Iterator[dict]:
    with webhook() as state:
        yield state | {"block": save_block("team", state["url"])}


@pytest.fixture
def hook(team) -> dict:
    """The webhook, emptied."""
    for kept in ("messages", "failures", "asked"):
        team[kept].clear()
    return team


@pytest.fixture(scope="module")
def dead(prefect) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return save_block("dead", f"http://127.0.0.1:{free.getsockname()[1]}")


@stage("compare")
def works(of: str) -> str:
    return of


@stage("compare")
def breaks(of: str) -> str:
    raise DataError(Problem("200 rows", "contract.suite", "at least 500", "add rows"))


def retrain(root: Path, notified: list[str], task: Task = works, **more) -> State:
    """One real stage and a planted report, in a flow with the retrain's own hooks."""

    def body(spec: RunSpec, reason: str = "") -> RunReport:
        run = Stages.of(spec)
        run.run(task, reason)
        return run.end(planted(root))

    own = retrain_flow
    hooked = flow(
        name="retrain", on_running=own.on_running_hooks, on_completion=own.on_completion_hooks,
        on_failure=own.on_failure_hooks, on_crashed=own.on_crashed_hooks,
        result_storage=root, result_serializer="json",
    )  # fmt: skip
    spec = {"schedule": {"notify": notified}, "store": {"root": str(root)}, **more.pop("spec", {})}
    return hooked(body)(spec, return_state=True, **more)


# --- messages -----------------------------------------------------------------------------------------------


@dataclass
class Run:
    state: State
    messages: list[tuple[str, str]]
    asked: list[tuple[str, str]]
    stderr: str
    log: str
    root: Path


@pytest.fixture(scope="module")
def first(team, dead, tmp_path_factory) -> Run:
    """A run that notifies four blocks: one is not there, one's server is down, one's server refuses, one works."""
    root, text = tmp_path_factory.mktemp("first"), io.StringIO()
    with redirect_stderr(text), webhook() as refusing:
        refusing["failures"] += 6 * [404]
        blocks = [MISSING, dead, save_block("refusing", refusing["url"]), team["block"]]
        state = retrain(root, blocks, reason="120 new rows")
    wanted, log, deadline = "custom-webhook/refusing was not sent 'm version 1", "", time.monotonic() + 20
    while wanted not in log and time.monotonic() < deadline:  # it is sent every two seconds
        time.sleep(0.2)
        log = log_of(state)
    return Run(state, list(team["messages"]), list(team["asked"]), text.getvalue(), log, root)


def log_of(state: State) -> str:
    with get_client(sync_client=True) as client:
        asked = {"logs": {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}}
        return "\n".join(line["message"] for line in client.request("POST", "/logs/filter", json=asked).json())


def test_a_retrain_sends_its_start_with_the_reason_and_its_verdict(first):
    (start, begun), (verdict, ended) = first.messages
    assert start == "tunegate-model: retrain started"
    assert begun.startswith(
        "reason: 120 new rows\ntrains lora, qlora on builtin:smollm2-135m\nPrefect: http://127.0.0.1"
    )
    assert verdict == "m version 1: PASS"
    assert "1 of 1 gates passed on 15 held-out items" in ended
    assert "champion now: none yet" in ended
    assert f"report: {first.root}/store/runs/" in ended
    assert "MLflow: run mlflow-20261124-abc, `tunegate up`" in ended
    assert str(first.state.state_details.flow_run_id) in ended


def test_a_run_that_finds_all_done_sends_nothing(first, hook):
    assert retrain(first.root, [hook["block"]], reason="120 new rows").name == "Skipped"
    assert hook["messages"] == []


def test_a_failure_names_the_stage_the_problem_and_the_next_act(hook, tmp_path):
    state = retrain(tmp_path, [hook["block"]], breaks)
    assert state.is_failed()
    subject, body = hook["messages"][-1]
    assert subject == "tunegate-model: retrain FAILED"
    assert body.splitlines()[:2] == [
        "in stage compare",
        "- contract.suite: 200 rows; limit: at least 500; next: add rows",
    ]


def test_a_spec_that_is_wrong_fails_its_run_and_is_sent(hook, tmp_path):
    assert retrain(tmp_path, [hook["block"]], spec={"train": {"rank": 0}}).is_failed()
    assert [subject for subject, _ in hook["messages"]] == ["tunegate-model: retrain FAILED"]


def test_a_block_that_is_missing_is_reported_before_the_first_stage_and_fails_nothing(first):
    assert first.state.name == "Completed"
    warning = f"warning: schedule.notify: no block {MISSING}\n    next: create it: docs/notifications.md shows how"
    assert first.stderr.index(warning) < first.stderr.index("ran  compare")
    assert first.stderr.count(warning) == 2  # the second time for the verdict: it may have been made meanwhile
    assert f"no block {MISSING}" in first.log


def test_a_webhook_that_is_down_or_refuses_is_reported_on_stderr_and_in_the_log(first):
    for block, error in (("dead", "ConnectError"), ("refusing", "HTTPStatusError 404")):
        line = f"custom-webhook/{block} was not sent 'm version 1: PASS': {error}\n    limit: 3 tries"
        assert line in first.stderr
        assert line in first.log


def test_no_secret_of_a_block_is_in_what_prefect_or_a_terminal_shows(first):
    assert set(first.asked) == {(f"/{SECRET}", f"Bearer {SECRET}")}, "the block used it"
    with get_client(sync_client=True) as client:
        kinds = ("flow_runs", "task_runs", "artifacts")
        shown = [client.request("POST", f"/{kind}/filter", json={}).text for kind in kinds]
    assert "custom-webhook/team" in shown[0], "the parameters of the run"
    assert SECRET not in first.stderr + first.log + "".join(shown)


def test_what_is_transient_is_retried_and_a_status_is_shown_without_the_address(hook, capfd):
    message = notifications.Notice("subject", "body")
    hook["failures"] += [503, 429]
    notify._send([hook["block"]], message)
    assert hook["messages"] == [("subject", "body")]
    hook["failures"] += [500, 500, 500]
    notify._send([hook["block"]], message)
    printed = capfd.readouterr().err
    assert "custom-webhook/team was not sent 'subject': HTTPStatusError 500" in printed
    assert SECRET not in printed


def test_a_block_of_another_kind_is_reported(capfd):
    Secret(value="x").save("plain", overwrite=True)
    notify._send(["secret/plain"], notifications.Notice("subject", "body"))
    assert "secret/plain cannot notify\n    limit: a notification block" in capfd.readouterr().err


def test_a_champion_moved_by_hand_notifies_the_blocks_of_the_newest_run(hook, tmp_path):
    for name, notified, age in (("new", [hook["block"]], 0), ("old", [MISSING], 100)):
        report = planted(tmp_path, name)
        report.spec["model"]["name"], report.spec["schedule"]["notify"] = "m", notified
        saved(report, tmp_path, age)
    store, version = (
        StoreSpec(root=str(tmp_path)),
        ModelVersion(name="m", version="2", aliases=["champion"], run_id="r"),
    )
    move = Move(
        id="i", name="m", act="promote", before="1", to="2", who="anna@host", run=None, unix_seconds=1.0,
        why="we know better", overrode=["the gates say fail"], evidence=None,
    )  # fmt: skip
    plain = move.model_copy(update={"before": None, "overrode": [], "act": "rollback"})
    for made in (move, plain, None):  # the last was champion already
        notify.champion_moved(store, Moved(model=version, move=made))
    who = "why: we know better\nwho: anna@host"
    assert hook["messages"] == [
        ("m version 2 is champion now, by override", f"before: version 1\noverruled: the gates say fail\n{who}"),
        ("m version 2 is champion now, by rollback", f"before: none\n{who}"),
    ]


class _Smtp(socketserver.StreamRequestHandler):
    """As much of a mail server as a client waits for; keeps the text it was sent."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        for line in self.rfile:
            word = line[:4].upper().strip()
            self.wfile.write({b"DATA": b"354 go on\r\n", b"QUIT": b"221 bye\r\n"}.get(word, b"250 fine\r\n"))
            if word == b"DATA":
                self.server.mail = b"".join(iter(self.rfile.readline, b".\r\n")).decode()
                self.wfile.write(b"250 kept\r\n")
            if word == b"QUIT":
                return


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # by apprise, before Python 3.13
def test_an_apprise_url_sends_e_mail_by_smtp():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Smtp) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"mailto://127.0.0.1:{server.server_address[1]}?from=a@example.org&to=b@example.org&format=text"
        notify.AppriseUrl(url=url).save("mail", overwrite=True)
        notify._send(["apprise-url/mail"], notifications.Notice("m version 1: PASS", "line one\nline two"))
        server.shutdown()
    assert "Subject: m version 1: PASS" in server.mail
    assert "\r\nline one\r\nline two\r\n" in server.mail


# --- what a message says ------------------------------------------------------------------------------------


def gate(name: str, verdict: str, actual: float | None = 0.5) -> GateResult:
    spread = None if actual is None else (actual - 0.1, actual + 0.1)
    return GateResult(
        name=name, direction="at least", threshold=0.9, actual=actual, interval=spread, verdict=verdict, why="so"
    )


def verdict_of(verdict: str, gates: list[GateResult], root: Path, champion: str | None) -> notifications.Notice:
    report = planted(root).model_copy(update={"gate": GateReport(gates=gates, off=[], verdict=verdict)})
    return notifications.verdict_notice(
        report, "r", champion, root / "report.html", "http://m/#/runs/1", "http://p/runs/1"
    )


def test_a_verdict_names_the_gates_that_decide_and_who_is_champion(tmp_path):
    gates = [gate(f"g{n}", "fail") for n in range(4)] + [gate("fine", "pass"), gate("open", "inconclusive")]
    notice = verdict_of("fail", gates, tmp_path, "7")
    assert notice.subject == "m version 1: FAIL"
    assert notice.body.splitlines() == [
        "1 of 6 gates passed on 15 held-out items",
        *(f"- g{n} 0.500 (0.400 to 0.600), must be at least 0.9: fail" for n in range(3)),
        "champion now: version 7",
        f"report: {tmp_path}/report.html",
        "MLflow: http://m/#/runs/1",
        "Prefect: http://p/runs/1",
    ]
    assert "- open 0.500" in verdict_of("inconclusive", gates[4:], tmp_path, "7").body
    passed = [gate(name, "pass") for name in ("candidate_stops", "candidate_beats_base", "not_worse_than_champion")]
    body = verdict_of("pass", passed, tmp_path, "1").body
    assert [line.split()[1] for line in body.splitlines() if line.startswith("- ")] == [
        "not_worse_than_champion",
        "candidate_beats_base",
    ]
    assert "champion now: version 1, the new one" in body


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            WorkerError(Problem(f"ended with code 1:\n{SECRET}", "tasks.x.workers.y", act="read worker.log")),
            "- tasks.x.workers.y: ended with code 1:; next: read worker.log",
        ),
        (ValueError(f"POST https://hooks/{SECRET}"), "- ValueError; next: read the run's log"),
    ],
)
def test_a_failure_shows_no_text_that_could_hold_a_secret(error, line):
    assert notifications.failed_notice("m", "r", ["in stage x"], error, None).body.splitlines() == [
        "in stage x",
        line,
        "Prefect: run r, `tunegate up` serves its page",
    ]


def test_pages_are_linked_where_a_server_is_known_and_never_with_a_password(monkeypatch):
    local = StoreSpec()
    assert links.mlflow_page(local, "7f") is None
    assert links.mlflow_page(StoreSpec(mlflow_uri="sqlite:///x.db"), "7f") is None
    monkeypatch.setenv(links.MLFLOW_PAGE, "https://u:p@mlflow.example.org/a/")
    assert links.mlflow_page(StoreSpec(), "7f") == ("https://mlflow.example.org/a/#/runs/7f")
    monkeypatch.setenv(links.MLFLOW_PAGE, "http://127.0.0.1:5000")
    assert links.mlflow_page(local, "7f") == "http://127.0.0.1:5000/#/runs/7f"
    with temporary_settings({PREFECT_API_URL: "http://u:p@127.0.0.1:4200/api"}):
        assert links.prefect_page("7f") == "http://127.0.0.1:4200/runs/flow-run/7f"
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert links.prefect_page("7f") is None


# --- artifacts ----------------------------------------------------------------------------------------------

MARKDOWN = MarkdownIt("commonmark").enable("table")
HOSTILE = "a|b<script>x</script>[l](http://e)\n# h"


def show_all(report: RunReport, root: Path) -> None:
    artifacts.publish_data(Store(root), report.dataset)
    for arm in report.arms:
        artifacts.publish_training(arm)
    artifacts.publish_verdict(report.arms, report.evaluations, report.comparison, report.gate)
    artifacts.publish_report(report)


def hostile(report: RunReport) -> RunReport:
    data = report.dataset.model_copy(update={"reasons": {HOSTILE: 1}, "languages": {HOSTILE: 1}, "data_docs": HOSTILE})
    slices = [report.comparison.slices[0].model_copy(update={"name": HOSTILE})]
    gates = [report.gate.gates[0].model_copy(update={"why": HOSTILE})]
    return report.model_copy(
        update={
            "dataset": data,
            "comparison": report.comparison.model_copy(update={"slices": slices}),
            "gate": report.gate.model_copy(update={"off": [HOSTILE], "gates": gates}),
            "arms": [arm.model_copy(update={"threads_reason": HOSTILE}) for arm in report.arms],
        }
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The artifacts of a flow that shows a planted report, and one whose texts are hostile."""
    root = tmp_path_factory.mktemp("pages")

    @flow(result_storage=root)
    def toy(report: RunReport) -> None:
        show_all(report, root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(links.MLFLOW_PAGE, "http://127.0.0.1:5000")
        states = [toy(report, return_state=True) for report in (planted(root), hostile(planted(root)))]
    return root, *(shown(state.state_details.flow_run_id) for state in states)


def test_a_run_shows_its_data_training_comparison_gates_and_where_to_look(pages):
    root, found, _ = pages
    assert set(found) == {"data", "training-lora", "training-qlora", "comparison", "gates", "report"}
    assert {key: item.type for key, item in found.items() if item.type != "markdown"} == {"gates": "table"}
    for row in ("| in | 100 |", "| **kept** | 90 |", "| in test | 15 |", "| near | 2 |", "| for empty_answer | 3 |"):
        assert row in found["data"].data
    assert "drift against snapshot 6666666666666666: ks_prompt_chars 0.125" in found["data"].data
    assert "| 1 to 1 | 4.000 | - | 12.0 |" in found["training-qlora"].data
    for line in (
        "- at the peak, measured: libraries 500.0 MB, the base's weights 125.0 MB, adapters 20.0 MB, optimiser states 40.0 MB, activations, logits, gradients, kernels together 715.0 MB",
        "- device: cpu (torch is built without CUDA)",
        "- precision: fp32 (no bf16)",
        "- attention: packed forward (losses equal the padded forward's)",
        "- batch: 4.0 rows and 900 tokens a step (train.batch_tokens=1024 holds no more)",
        "- threads: 2 (2 of 2 cores are free)",
    ):
        assert f"\n{line}\n" in found["training-qlora"].data + "\n"
    assert "| held-out loss, nats/token | 4.000 | 2.000 | 2.200 |" in found["comparison"].data
    assert "| peak memory in training | - | 1.40 GB | 1.40 GB |" in found["comparison"].data
    assert "- QLoRA keeps 90.0% \\[85.0%, 95.0%\\] of LoRA's loss gain" in found["comparison"].data
    (row,) = json.loads(found["gates"].data)
    assert row == {
        "gate": "retention", "must be": "at least 0.8", "is": "0.900", "interval": "0.850 to 0.950", "verdict": "pass", "why": "kept"
    }  # fmt: skip
    assert found["gates"].description == "**PASS**; not judged: max_ms_per_token is null"
    report = found["report"].data
    assert "`models:/m@champion`" in report
    assert f"[report.html](file://{root}/store/runs/20261124-abc/report.html)" in report
    assert "[the run with its children](http://127.0.0.1:5000/#/runs/mlflow-20261124-abc)" in report
    assert re.search(r"\[this run\]\(http://127.0.0.1:\d+/runs/flow-run/[0-9a-f-]{36}\)", report)


def test_text_from_data_forms_no_markup_in_an_artifact(pages):
    _, _, found = pages
    assert len(found) == 6
    for key, item in found.items():
        cells = (
            [cell for row in json.loads(item.data) for cell in row.values()] if item.type == "table" else [item.data]
        )
        html = "".join(MARKDOWN.render(text) for text in [*cells, item.description or ""])
        assert "<script" not in html, key
        assert 'href="http://e"' not in html, key
        if key != "report":
            assert "a|b&lt;script&gt;x&lt;/script&gt;[l](http://e) # h" in html, f"{key} shows it as it was"
    for key in ("data", "comparison", "report", "training-lora"):
        tables = re.findall(r"(?:^\|.*\n)+", found[key].data, re.MULTILINE)
        assert tables
        assert all(len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1 for table in tables)


def test_live_training_is_updated_seldom_and_ends_at_100_percent(tmp_path, monkeypatch):
    updates = []

    def counted(*args) -> UUID:
        updates.append(args)
        return update_progress_artifact(*args)

    @flow(result_storage=tmp_path)
    def toy() -> None:
        live = artifacts.LiveTraining("qlora_r64-17")
        live.show({"event": "note", "text": "other events are not shown"})
        for step in range(1, 1001):
            live.show({"event": "step", "step": step, "of": 1000, "loss_nats": 4 - step / 1000})

    monkeypatch.setattr(artifacts, "update_progress_artifact", counted)
    (item,) = shown(toy(return_state=True).state_details.flow_run_id).values()
    assert (item.key, item.type, item.data) == ("training-qlora-r64-17", "progress", 100)
    assert item.description == "step 1000 of 1000, loss 3.000 nats/token"
    assert len(updates) < 5, "1,000 steps took less than 20 seconds"


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow:FutureWarning")
def test_an_artifact_that_cannot_be_made_raises_nothing(tmp_path, capfd):
    live = artifacts.LiveTraining("qlora")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):  # nothing listens there
        artifacts.publish_data(Store(tmp_path), planted(tmp_path).dataset)
        for step in (1, 2, 3):
            live.show({"event": "step", "step": step, "of": 3, "loss_nats": 4.0})
    printed = capfd.readouterr().err
    assert "warning: publish_data: not shown in Prefect: ConnectError" in printed
    assert printed.count("warning: _update: not shown") == 1, "none is tried after one that failed"
