"""The whole chain, for real, as a user runs it: the smoke preset through the command, on a tiny model.

One run is shared by most tests. Later ones kill it, change a setting, gate, promote, roll back and ask.
Run: pytest tests/flows/test_chain.py
"""

import html
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings

from data_contracts.errors import ConfigError, GateError
from data_contracts.lineage import Lineage
from data_contracts.run_spec import StoreSpec
from tasks.release.judgements import newest_judgement
from tasks.release.registry import resolve
from tasks.runtime.store import digest
from tests.support.servers import COMMAND, prefect_server
from tests.support.webhook import save_block, shown, webhook

pytestmark = pytest.mark.timeout(900)  # the first test of each fixture waits for a whole run
CHANGED = ["--set", "train.learning_rate=0.004", "--set", "train.max_steps=60", "--set", "train.epochs=10"]

SECRETS = {
    name: f"planted-{name.lower().replace('_', '-')}-7b1f"
    for name in (
        "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "GITHUB_TOKEN",
        "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "TUNEGATE_SERVE_TOKEN",
    )
}  # fmt: skip
NOTIFY = ["--set", "schedule.notify=[custom-webhook/team]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def environment(place) -> Iterator[dict[str, str]]:
    """An empty HOME and one Prefect server for all commands: each would start one of its own otherwise."""
    with prefect_server(place) as found:
        yield found | SECRETS


@pytest.fixture(scope="module")
def hook(environment) -> Iterator[dict]:
    """A webhook that every run notifies; this process speaks with the commands' Prefect server too."""
    with webhook() as state, temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
        save_block("team", state["url"])
        yield state


@pytest.fixture(scope="module")
def tunegate(place, environment, hook):
    """Run the command in an empty folder; answer with (exit code, JSON, stderr)."""

    def run(*arguments: str) -> tuple[int, dict, str]:
        notified = NOTIFY if arguments[0] == "run" else []
        command = [*COMMAND, *arguments, *notified, "--json", "--set", f"store.root={place / 'store'}"]
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout), done.stderr

    return run


@pytest.fixture(scope="module")
def first(tunegate) -> dict:
    code, result, errors = tunegate("run", "smoke")
    assert code == 0, errors
    return {**result, "log": errors}


def statuses(result: dict) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in result["stages"]}


# --- one run ------------------------------------------------------------------------------------------------


def test_every_row_is_accounted_for(first):
    snapshot = first["snapshot"]
    assert snapshot["rows_in"] == snapshot["kept"] + snapshot["quarantined"] + snapshot["duplicates"]
    assert snapshot["kept"] == sum(snapshot["splits"].values())
    assert all(snapshot["splits"][name] > 0 for name in ("train", "validation", "test"))


def test_both_arms_start_from_one_adapter_and_end_with_their_own(first):
    assert [arm["method"] for arm in first["arms"]] == ["lora", "qlora"]
    assert len({arm["step0_sha256"] for arm in first["arms"]}) == 1
    assert len({arm["adapter_sha256"] for arm in first["arms"]} | {first["arms"][0]["step0_sha256"]}) == 3
    assert len({arm["train_tokens"] for arm in first["arms"]}) == 1


def test_training_lowers_the_held_out_loss_and_the_gates_say_so(first):
    base = first["base"]["eval"]["nll_nats"]
    for arm in first["arms"]:
        gain = first["comparison"]["gains"][arm["method"]]
        assert 0 < gain["low"] <= base - arm["eval"]["nll_nats"] <= gain["high"]
    assert first["verdict"] == "pass"
    assert {gate["name"]: gate["verdict"] for gate in first["gates"]} == {
        "lora_beats_base": "pass",
        "qlora_keeps_loras_gain": "pass",
        "candidate_beats_base": "pass",
        "not_worse_than_champion": "pass",
        "every_slice_gains": "pass",
    }


def test_memory_and_speed_are_measured(first):
    lora, qlora = first["arms"]
    assert qlora["weights_bytes"] < lora["weights_bytes"] < lora["peak_rss_bytes"]
    assert all(arm["useful_tokens_per_s"] > 0 and arm["seconds"] > 0 for arm in first["arms"])


CHOSEN = ("device", "precision", "scoring", "batch", "threads")


def test_every_automatic_choice_has_its_reason_in_the_log_the_run_and_the_report(first, place):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{place / 'store' / 'mlflow.db'}")
    page = html.unescape(Path(first["html"]).read_text())
    for arm in first["arms"]:
        params = client.get_run(arm["mlflow_run_id"]).data.params
        for name in CHOSEN:
            reason = arm[f"{name}_reason"]
            assert len(reason) > 10
            assert params[f"{name}_reason"] == reason
            assert f"<td>{reason}</td>" in page
            assert reason in first["log"]


def test_memory_is_shown_part_by_part_in_the_run_and_the_report(first, place):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{place / 'store' / 'mlflow.db'}")
    page = Path(first["html"]).read_text()
    for arm in first["arms"]:
        metrics = client.get_run(arm["mlflow_run_id"]).data.metrics
        for kind, peak in (("measured", "peak_train_bytes"), ("planned", "predicted_train_bytes")):
            parts = arm[f"{kind}_memory"]
            assert {part: metrics[f"{kind}_{part}_bytes"] for part in parts} == parts
            assert sum(parts.values()) == arm[peak]
            assert kind == "planned" or min(parts.values()) > 0
            assert f"<td>{arm['name']}, {kind}</td>" in page
        assert metrics["gradients_bytes"] == arm["gradients_bytes"] > 0


def test_the_version_is_champion_and_answers_as_it_was_evaluated(first):
    assert first["model"]["version"] == "1"
    assert first["model"]["aliases"] == ["challenger", "champion"]
    assert first["loaded_back"]["as_evaluated"] is True
    check = first["loaded_back"]["check"]
    assert check["refusals"] == [] and check["difference_nats"] < check["tolerance_nats"]


def test_no_secret_of_the_environment_is_left_anywhere(first, place):
    """Not in the store's files, its databases and logs, nor in Prefect's."""
    files = [path for path in place.rglob("*") if path.is_file()]
    assert {"mlflow.db", "prefect.db", "prefect.log", "report.html", "MLmodel"} <= {path.name for path in files}
    held = {path: name for path in files for name, value in SECRETS.items() if value.encode() in path.read_bytes()}
    assert held == {}


def test_mlflow_holds_a_parent_with_comparable_children(first, place):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{place / 'store' / 'mlflow.db'}")
    parent = client.get_run(first["mlflow_run_id"])
    assert parent.data.metrics["retention"] == pytest.approx(first["comparison"]["retention"]["value"])
    assert {item.dataset.digest for item in parent.inputs.dataset_inputs} == {
        first["snapshot"][name]["sha256"][:32] for name in ("train", "test")
    }
    children = [client.get_run(arm["mlflow_run_id"]) for arm in first["arms"]]
    assert children[0].data.metrics.keys() == children[1].data.metrics.keys()
    assert {"nll_nats", "accuracy", "peak_rss_bytes", "loss_nats"} <= children[0].data.metrics.keys()
    assert len(client.get_metric_history(children[0].info.run_id, "loss_nats")) == first["arms"][0]["steps"]
    tags = client.get_model_version("tunegate-smoke", "1").tags
    assert tags["tunegate.adapter_sha256"] == first["arms"][1]["adapter_sha256"]
    pictures = {item.path for item in client.list_artifacts(first["mlflow_run_id"], "comparison")}
    assert pictures == {f"comparison/{name}.png" for name in ("losses", "quality", "memory", "speed", "slices")}
    files = [client.download_artifacts(child.info.run_id, "items.json", str(place)) for child in children]
    items = [json.loads(Path(file).read_text()) for file in files]
    assert items[0]["columns"] == items[1]["columns"]
    assert len(items[0]["data"]) == first["comparison"]["items"]
    assert not list(place.glob("mlruns")), "MLflow wrote outside of the store"


def test_the_version_carries_its_evidence_and_its_metrics_name_their_data(first, place):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{place / 'store' / 'mlflow.db'}")
    version = client.get_model_version("tunegate-smoke", "1")
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    folder = Path(mlflow.artifacts.download_artifacts(logged.artifact_location))
    lineage = Lineage.model_validate_json((folder / "artifacts" / "evidence" / "lineage.json").read_bytes())
    assert (
        lineage.files == {name: digest(folder / "artifacts" / name) for name in lineage.files}
        and len(lineage.files) > 20
    )
    assert (
        lineage.data.source_rows == {"python-docs": first["snapshot"]["rows_in"]} and lineage.data.licence == "PSF-2.0"
    )
    assert lineage.judgement.nll_nats == first["arms"][1]["eval"]["nll_nats"]
    texts = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".png", ".safetensors")]
    assert [path.name for path in texts if str(place) in path.read_text()] == []
    found = {(item.dataset_name, item.dataset_digest) for item in logged.metrics if item.key == "nll_nats"}
    assert ("test", first["snapshot"]["test"]["sha256"][:32]) in found


@pytest.mark.slow
def test_the_version_is_made_again_to_the_byte(first, tunegate):
    code, found, errors = tunegate("reproduce", "models:/tunegate-smoke/1")
    assert (code, found["result"]) == (0, "identical"), errors
    assert found["adapter_now"] == first["arms"][1]["adapter_sha256"] and len(found["compared"]) > 20
    assert {item["what"] for item in found["compared"] if not item["same"]} <= {
        "commit"
    }  # somebody may work on the checkout
    code, found, _ = tunegate("reproduce", "models:/tunegate-smoke/1", "--set", "train.rank=8")
    assert code == 2 and "train.rank is what it was then" in found["error"]["problems"][0]["what"]


def test_mlflow_holds_the_contract_with_its_failing_rows_and_its_pages(first, place):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{place / 'store' / 'mlflow.db'}")
    folder = Path(client.download_artifacts(first["mlflow_run_id"], "contract", str(place)))
    results = json.loads((folder / "contract.json").read_text())["results"]
    assert len(results) > 10
    assert all(isinstance(item["failing_rows"], list) for item in results)
    assert (folder / "data_docs" / "index.html").is_file()
    assert len(list((folder / "data_docs" / "validations").rglob("*.html"))) == 2


def test_the_report_shows_the_verdict_and_escapes_what_comes_from_data(first, place):
    page = Path(first["html"]).read_text()
    assert "tunegate-smoke version 1" in page
    assert page.count("<svg") == 5  # losses, quality, memory, speed, slices
    assert "<script" not in page


def artifacts_of(result: dict) -> dict:
    name = result["run_id"].rpartition("-")[0]
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
    return shown(run.id)


def test_a_notice_is_sent_at_the_start_and_with_the_verdict(first, hook):
    (start, begun), (verdict, ended) = hook["messages"]
    assert start == "tunegate-smoke: retrain started"
    assert "trains lora, qlora on builtin:tiny-llama" in begun
    assert verdict == "tunegate-smoke version 1: PASS"
    assert "champion now: version 1, the new one" in ended
    gain = first["comparison"]["gain"]
    assert f"- candidate_beats_base {gain['value']:.3f} ({gain['low']:.3f} to {gain['high']:.3f})" in ended
    assert f"report: {first['html']}" in ended
    assert f"MLflow: run {first['mlflow_run_id']}" in ended


def test_prefects_page_shows_the_data_the_training_the_comparison_the_gates_and_the_report(first):
    found = artifacts_of(first)
    assert set(found) == {"data", "training-lora", "training-qlora", "comparison", "gates", "report"}
    assert f"| in | {first['snapshot']['rows_in']} |" in found["data"].data
    assert "QLoRA, seed 17: 12 steps" in found["training-qlora"].data
    losses = (first["base"]["eval"], *(arm["eval"] for arm in first["arms"]))
    row = " | ".join(f"{item['nll_nats']:.3f}" for item in losses)
    assert f"| held-out loss, nats/token | {row} |" in found["comparison"].data
    gates = {gate["gate"]: gate["verdict"] for gate in json.loads(found["gates"].data)}
    assert gates == {gate["name"]: gate["verdict"] for gate in first["gates"]}
    assert "`models:/tunegate-smoke@champion`" in found["report"].data
    assert f"[report.html]({Path(first['html']).as_uri()})" in found["report"].data


def test_nothing_is_written_to_home(first, place):
    assert list((place / "home").rglob("*")) == []


# --- again --------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_prefect_calls_it_skipped(first, tunegate, place, hook):
    sent = len(hook["messages"])
    code, again, _ = tunegate("run", "smoke")
    assert code == 0
    with closing(sqlite3.connect(place / "prefect" / "prefect.db")) as prefect:
        states = prefect.execute("select state_name from flow_run order by start_time")
        assert [name for (name,) in states][:2] == ["Completed", "Skipped"]
    assert set(statuses(again).values()) == {"cached"}
    assert again["model"] == first["model"]
    assert again["mlflow_run_id"] == first["mlflow_run_id"]
    assert len(hook["messages"]) == sent, "there is nothing to send"
    before, after = artifacts_of(first), artifacts_of(again)
    assert {key: item.data for key, item in after.items() if key != "report"} == {
        key: item.data for key, item in before.items() if key != "report"
    }


def _worker(pid: int) -> int | None:
    """The training worker below a process, once it has written a checkpoint."""
    import psutil

    children = psutil.Process(pid).children(recursive=True)
    for child in children:
        line = child.cmdline()
        if "tasks.training.workers.train_adapter" in line and list(Path(line[-1]).glob("checkpoint-*/manifest.json")):
            return child.pid
    return None


@pytest.fixture(scope="module")
def second(first, tunegate, place, environment) -> dict:
    """Another learning rate, through a worker killed once and the command itself killed once."""
    command = [*COMMAND, "run", "smoke", *CHANGED, *NOTIFY, "--set", f"store.root={place / 'store'}"]
    with (place / "killed.log").open("w") as log:
        running = subprocess.Popen(command, env=environment, cwd=place, stdout=log, stderr=log)
        killed = 0
        while killed < 2 and running.poll() is None:
            worker = _worker(running.pid)
            if worker is None:
                time.sleep(0.02)
                continue
            os.kill(worker if killed == 0 else running.pid, signal.SIGKILL)
            killed += 1
            time.sleep(0.5)
        running.wait()
    assert (killed, running.returncode) == (2, -signal.SIGKILL), (place / "killed.log").read_text()
    code, result, errors = tunegate("run", "smoke", *CHANGED)
    assert code in (0, 1, 3), errors
    return result


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_checkpoint(second):
    assert second["arms"][0]["resumed_from_step"] > 0
    assert second["arms"][0]["steps"] == 60


@pytest.mark.slow
def test_another_learning_rate_reruns_training_but_not_data(second):
    found = statuses(second)
    assert {found[name] for name in ("ingest", "validate", "curate", "prepare_base", "init_adapter")} == {"cached"}
    assert {found[name] for name in ("train lora", "train qlora", "evaluate", "register")} == {"ran"}


@pytest.mark.slow
def test_the_new_version_had_to_face_the_champion(second):
    (gate,) = (gate for gate in second["gates"] if gate["name"] == "not_worse_than_champion")
    assert "tunegate-smoke version 1" in gate["why"]
    assert gate["actual"] is not None
    assert second["model"]["version"] == "2"


# --- release ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_gate_command_judges_a_registered_version(first, tunegate, place):
    code, decision, errors = tunegate("gate", "--model", "models:/tunegate-smoke/1")
    assert code in (0, 1, 3), errors
    assert decision["verdict"] == {0: "pass", 1: "fail", 3: "inconclusive"}[code]
    assert decision["comparison"]["nll_nats"].keys() >= {"base", "candidate"}
    store = StoreSpec(root=str(place / "store"))
    kept = newest_judgement(store, resolve(store, "models:/tunegate-smoke/1"))
    assert kept.is_later and kept.verdict == decision["verdict"], "for `tunegate promote`"
    assert kept.answers[0].next_tokens and kept.precision


@pytest.mark.slow
def test_predict_answers_from_the_registry(first, tunegate):
    code, answer, errors = tunegate(
        "predict", "What does `json.dumps` do?", "--model", "models:/tunegate-smoke@champion"
    )
    assert code == 0, errors
    assert isinstance(answer["answer"], str)


def test_a_model_that_is_not_there_is_an_input_error_with_what_there_is(first, tunegate):
    code, error, _ = tunegate("predict", "hello?", "--model", "models:/tunegate-smoke/99")
    assert code == 2
    assert "has versions 1" in error["error"]["problems"][0]["act"]


def test_the_ledger_says_who_made_the_version_champion_and_on_what_evidence(first, tunegate):
    code, found, errors = tunegate("history", "tunegate-smoke")
    assert (code, found["champion"], found["problems"]) == (0, "1", []), errors
    (entry,) = found["entries"]
    move = entry["move"]
    assert (move["act"], move["before"], move["to"], move["why"]) == ("promote", None, "1", "gates: pass")
    assert "@" in move["who"] and move["run"] == first["run_id"].rpartition("-")[0]
    assert move["evidence"]["lineage_sha256"] and move["evidence"]["check"] == first["loaded_back"]["check"]


@pytest.mark.slow
def test_the_command_checks_a_version_in_a_fresh_process_and_moves_the_champion(second, tunegate):
    first, other = ("promote", "tunegate-smoke", "--override", "--reason", "to see"), ("rollback", "tunegate-smoke")
    for version in ("1", "2"):
        code, payload, errors = tunegate(*first, "--version", version)
        assert code == 0, errors
    code, payload, errors = tunegate(*other)
    assert (code, payload["move"]["before"], payload["move"]["to"]) == (0, "2", "1"), errors
    check = payload["move"]["evidence"]["check"]
    assert check["refusals"] == [] and check["difference_nats"] < check["tolerance_nats"]


@pytest.mark.slow
def test_promotion_needs_a_passed_gate_or_a_reason_and_can_be_rolled_back(second, place, hook):
    from flows.promote import promote, rollback
    from tasks.release.promotion import Approval, promote_version
    from tasks.release.registry import champion
    from tasks.runtime.mlflow_client import connect

    store, name = StoreSpec(root=str(place / "store")), "tunegate-smoke"
    connect(store).set_model_version_tag(name, "2", "tunegate.verdict", "fail")
    promote_version(store, name, "1", Approval(override=True, reason="start of this test"))
    with pytest.raises(GateError, match="say fail"):
        promote_version(store, name, "2")
    assert champion(store, name).version == "1"
    promote(store, name, "2", override=True, reason="we know better")
    assert champion(store, name).version == "2"
    rollback(store, name)
    assert champion(store, name).version == "1"
    assert [subject for subject, _ in hook["messages"][-2:]] == [
        f"{name} version 2 is champion now, by override",
        f"{name} version 1 is champion now, by rollback",
    ]
    assert "overruled: the gates of tunegate-smoke version 2 say fail" in hook["messages"][-2][1]
    with pytest.raises(ConfigError, match="no challenger"):
        promote_version(store, "no-such-model", version=None)
