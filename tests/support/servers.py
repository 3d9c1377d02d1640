"""Real servers on loopback for tests, each in its own folder, and the command as a user runs it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "import sys; from flows.cli.app import main; sys.exit(main())"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def clean_environment(place: Path) -> dict[str, str]:
    """What a user has who never heard of Prefect or MLflow, with an empty HOME."""
    home = place / "home"
    home.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return clean | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


class Server:
    """A process that answers on a port; it can be killed and started again."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, health: str) -> None:
        self.command, self.environment, self.log, self.health = command, environment, log, health

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        _wait_for(self.health)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.killpg(self.process.pid, number)
        self.process.wait(30)


def prefect_on(place: Path, port: int) -> tuple[Server, dict[str, str]]:
    """A Prefect server, not yet started, and the environment of its clients."""
    environment = clean_environment(place)
    environment |= {"PREFECT_HOME": str(place / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--no-ui",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = Server(command, environment, place / "prefect.log", f"http://127.0.0.1:{port}/api/health")
    return server, environment | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}


def mlflow_on(place: Path, port: int) -> Server:
    """An MLflow server over a database of its own, not yet started."""
    environment = clean_environment(place) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{place / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(place / "artifacts"), "--serve-artifacts"]
    return Server(command, environment, place / "mlflow.log", f"http://127.0.0.1:{port}/health")


@contextmanager
def prefect_server(place: Path) -> Iterator[dict[str, str]]:
    """One server for all commands of a test module: each would start one of its own otherwise."""
    server, environment = prefect_on(place, free_port())
    server.start()
    try:
        yield environment
    finally:
        server.kill(signal.SIGTERM)


class Tunegate:
    """The command as a user runs it, in an empty folder of its own, with free ports for `up`."""

    def __init__(self, place: Path) -> None:
        self.place, self.environment = place, clean_environment(place)
        self.folder = place / "project"
        self.folder.mkdir()
        self.prefect, self.mlflow = free_port(), free_port()
        self.ports = ["--prefect-port", str(self.prefect), "--mlflow-port", str(self.mlflow)]

    def __call__(self, *arguments: str, **environment: str) -> tuple[int, dict, str]:
        """(exit code, the JSON on stdout, stderr)"""
        command = [*COMMAND, *arguments, "--json"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, env=self.environment | environment, cwd=self.folder, check=False, **streams)
        return done.returncode, json.loads(done.stdout), done.stderr

    def api(self, path: str, body: object = None) -> Any:
        """An answer of its Prefect server."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.prefect}/api{path}", data)
        request.add_header("Content-Type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            return json.load(response)


def _wait_for(url: str, seconds: float = 120) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with opener.open(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TimeoutError(url)
