"""The cluster's servers as infra/compose.yaml starts them, on real Postgres, and a whole run through them to a champion.

    pytest tests/services/test_postgres.py -m slow

The commands and the environment of `mlflow`, `prefect` and `worker` are read from the compose file; only hosts, ports and
the store's folder are others. moto stands in for SeaweedFS. Skipped where no Postgres is installed, unless
REQUIRE_POSTGRES=1.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from ruamel.yaml import YAML

from flows.config.load import load_spec
from tests.support.postgres import binaries, postgres
from tests.support.servers import COMMAND, Server, clean_environment, free_port

INFRA = Path(__file__).parents[2] / "infra"
SERVICES = YAML(typ="safe").load(INFRA / "compose.yaml")["services"]
ENV_EXAMPLE = (INFRA / ".env.example").read_text(encoding="utf-8")
# What the image sets, as far as it is not a folder of it.
IMAGE = {
    "PREFECT_LOCAL_STORAGE_PATH": "/store/store/results",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


PORTS = {"postgres": 5432, "s3": 8333, "mlflow": 5000, "prefect": 4200, "worker": 8080}


@dataclass
class Cluster:
    place: Path
    ports: dict[str, int]  # on this machine
    values: dict[str, str]  # of the file .env

    def here(self, text: str) -> str:
        """A value of the compose file with its variables filled in and its hosts, ports and /tmp as they are here."""
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: self.values[found[1]], text)
        for name, port in PORTS.items():
            text = re.sub(rf"(^|:){port}\b", rf"\g<1>{self.ports[name]}", text)
        text = re.sub(r"(?<=[@/])(postgres|s3|prefect)(?=:\d+(/|$))", "127.0.0.1", text)
        return text.replace("0.0.0.0", "127.0.0.1").replace("/tmp", str(self.place))

    def service(self, name: str) -> Server:
        """A service of the compose file as a process of this machine."""
        found = SERVICES[name]
        command = [sys.executable, "-m", *(self.here(part) for part in found["command"])]
        environment = clean_environment(self.place) | IMAGE
        environment |= {key: self.here(value) for key, value in found["environment"].items()}
        environment = {key: value.replace("/store/store", f"{self.store}/store") for key, value in environment.items()}
        environment |= {
            "PREFECT_HOME": str(self.place / name),
            "PREFECT_WORKER_WEBSERVER_PORT": str(self.ports["worker"]),
        }
        return Server(command, environment, self.place / f"{name}.log", self.here(found["healthcheck"]["test"][-1]))

    def s3(self) -> Server:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(self.ports["s3"])]
        health = f"http://127.0.0.1:{self.ports['s3']}/moto-api/"
        return Server(command, clean_environment(self.place), self.place / "s3.log", health)

    @property
    def store(self) -> Path:
        return self.place / "store"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def prefect(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}/api"

    def run(self, *args: str) -> dict[str, Any]:
        """A command as a user gives it, with the three settings of docs/cluster.md."""
        settings = ["--set", f"store.root={self.store}", "--set", f"store.mlflow_uri={self.mlflow}"]
        environment = clean_environment(self.place) | {"PREFECT_API_URL": self.prefect}
        command = [*COMMAND, *args, "--json", *settings]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=self.place)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)


def make_databases(entry: dict[str, str], values: dict[str, str]) -> None:
    """By the script that the postgres image runs once."""
    environment = os.environ | entry | values | {"PATH": f"{binaries()}:{os.environ['PATH']}"}
    subprocess.run(["sh", INFRA / "postgres-databases.sh"], check=True, env=environment)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    values = {name: secrets.token_hex(12) for name in re.findall(r"^(\w+)=", ENV_EXAMPLE, re.MULTILINE)}
    started: list[Server] = []
    with postgres() as entry:
        make_databases(entry, values)
        ports = {name: free_port() for name in PORTS} | {"postgres": int(entry["PGPORT"])}
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), ports, values)
        try:
            for server in (cluster.s3(), cluster.service("mlflow"), cluster.service("prefect")):
                started.append(server)
                server.start()
                if server is started[0]:
                    bucket(cluster).create_bucket(Bucket=SERVICES["s3"]["environment"]["S3_BUCKET"])
            yield cluster
        finally:
            for server in reversed(started):
                server.kill(signal.SIGTERM)


def bucket(cluster: Cluster) -> Any:
    import boto3

    keys = {
        "aws_access_key_id": cluster.values["S3_ACCESS_KEY"],
        "aws_secret_access_key": cluster.values["S3_SECRET_KEY"],
    }
    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{cluster.ports['s3']}", region_name="us-east-1", **keys)


@pytest.fixture(scope="module")
def champion(cluster: Cluster) -> dict[str, Any]:
    return cluster.run("run", "smoke")


def test_a_run_through_postgres_and_both_servers_ends_with_a_champion(champion):
    assert champion["verdict"] == "pass"
    assert "champion" in champion["model"]["aliases"]
    assert {stage["status"] for stage in champion["stages"]} == {"ran"}


def test_the_same_run_again_finds_every_stage_done(cluster, champion):
    again = cluster.run("run", "smoke")
    assert {stage["status"] for stage in again["stages"]} == {"cached"}
    assert again["model"] == champion["model"]


def test_artifacts_are_in_the_object_store_and_clients_need_no_key_of_it(cluster, champion):
    found = bucket(cluster).list_objects_v2(Bucket="mlflow")["Contents"]
    assert any(item["Key"].endswith("adapter_model.safetensors") for item in found)
    assert not list(cluster.store.glob("mlflow.db")) and not (cluster.store / "artifacts").exists()
    answer = cluster.run("predict", "What does json.dumps do?", "--model", "models:/tunegate-smoke@champion")
    assert "answer" in json.dumps(answer)


def test_both_servers_keep_their_records_in_postgres(cluster, champion):
    import psycopg2

    for name, table in (("mlflow", "model_versions"), ("prefect", "flow_run")):
        password = cluster.values[f"{name.upper()}_DB_PASSWORD"]
        login = {"host": "127.0.0.1", "port": cluster.ports["postgres"], "user": name, "password": password}
        with psycopg2.connect(dbname=name, **login) as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {table}")
            assert cursor.fetchone()[0] > 0


def test_mlflow_answers_to_its_name_in_the_network_and_to_no_other(cluster):
    asked = {}
    for host in (f"mlflow:{cluster.ports['mlflow']}", "evil.invalid"):
        url = f"{cluster.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
        asked[host] = requests.get(url, headers={"Host": host}, timeout=30).status_code
    assert list(asked.values()) == [200, 403]


def test_a_worker_of_the_pool_resumes_from_what_was_done_elsewhere(cluster, champion):
    worker = cluster.service("worker")
    worker.start()
    try:
        deploy(cluster)
        (deployment,) = [
            found
            for found in requests.post(f"{cluster.prefect}/deployments/filter", json={}, timeout=30).json()
            if found["entrypoint"].endswith("retrain_flow")
        ]
        assert deployment["work_pool_name"] == "tunegate"
        changes = [f"store.root={cluster.store}", f"store.mlflow_uri={cluster.mlflow}"]
        parameters = {"spec": load_spec("smoke", changes).spec.model_dump(mode="json")}
        url = f"{cluster.prefect}/deployments/{deployment['id']}/create_flow_run"
        run = requests.post(url, json={"parameters": parameters}, timeout=30).json()
        state = ended(cluster, run["id"])
        assert (state["type"], state["name"]) == ("COMPLETED", "Skipped"), state
    finally:
        worker.kill(signal.SIGTERM)


def deploy(cluster: Cluster) -> None:
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        "infra/prefect.yaml",
    ]
    environment = clean_environment(cluster.place) | {
        "PREFECT_API_URL": cluster.prefect,
        "PREFECT_HOME": str(cluster.place),
    }
    subprocess.run(command, check=True, env=environment, cwd=INFRA.parent, stdout=subprocess.DEVNULL)


def ended(cluster: Cluster, flow_run: str) -> dict[str, Any]:
    """The state a flow run ends in."""
    for _ in range(300):
        state = requests.get(f"{cluster.prefect}/flow_runs/{flow_run}", timeout=30).json()["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        time.sleep(1)
    raise TimeoutError(state)
