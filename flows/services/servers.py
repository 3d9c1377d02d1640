"""`tunegate ui`: MLflow's and Prefect's pages on this machine, over the store. Nothing listens beyond loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from data_contracts.errors import ConfigError, InfrastructureError, Problem
from data_contracts.run_spec import StoreSpec
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from rich.console import Console

HOST = "127.0.0.1"
MLFLOW_PORT = 5000
PREFECT_PORT = 4200
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # saves seven processes and 1.5 GB
HEALTH = {"MLflow": "/health", "Prefect": "/api/health"}
START_SECONDS = 180.0
_STOP_SECONDS = 10.0


@dataclass
class Server:
    """One child process that serves a page."""

    name: str
    port: int
    command: list[str]
    path: str  # answers 200 once the server is up
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def answers(self, seconds: float = 2.0) -> bool:
        return _answers(self.url + self.path, seconds)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # Its own session: Ctrl-C reaches only us, and we stop it in order.
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            if self.answers():
                return
            time.sleep(0.3)
        raise self.no_start()

    def no_start(self) -> InfrastructureError:
        """The last line of its log, and where the rest is."""
        tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] if self.log.exists() else []
        what = f"{self.name} did not start: {tail[0] if tail else 'its log is empty'}"
        return InfrastructureError(Problem(what, self.url, f"{START_SECONDS:.0f} s", f"read {self.log}"))

    def stop(self) -> None:
        """Stop the server and the processes it started."""
        if self.process is None or self.process.poll() is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(_STOP_SECONDS)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def servers(spec: StoreSpec, mlflow_port: int, prefect_port: int, logs: Path | None = None) -> list[Server]:
    """The two servers over this store, not yet started. A tracking server you name keeps its own page."""
    store = Store.of(spec)
    logs = logs or store.files.resolve() / "logs"
    # One worker: the default of four takes 0.8 GB more, for a page that few people read.
    mlflow = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"]
    mlflow += ["--backend-store-uri", store.database_uri, "--default-artifact-root", str(store.artifacts)]
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)]
    found = [] if spec.mlflow_uri else [Server("MLflow", mlflow_port, mlflow, HEALTH["MLflow"], logs / "mlflow.log")]
    return [*found, Server("Prefect", prefect_port, prefect, HEALTH["Prefect"], logs / "prefect.log")]


def start_all(wanted: list[Server]) -> None:
    """Start all or none: on any failure the started ones are stopped."""
    check_ports(wanted)
    os.environ |= ENVIRONMENT
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)  # Ctrl-C is how a page is closed: the servers are stopped in order
    try:
        for server in wanted:
            server.start()
        for server in wanted:
            server.wait_until_up()
    except BaseException:
        stop_all(wanted)
        raise


def wait_for_ctrl_c(running: list[Server]) -> None:
    """Return on Ctrl-C; raise if a server dies on its own."""
    try:
        while True:
            time.sleep(0.5)
            for server in running:
                if server.process is not None and server.process.poll() is not None:
                    raise InfrastructureError(Problem(f"{server.name} stopped", server.url, act=f"read {server.log}"))
    except KeyboardInterrupt:
        return
    finally:
        stop_all(running)


def show_servers(running: list[Server], console: "Console") -> None:
    for server in running:
        console.print(f"{server.name:<8} {server.url}", soft_wrap=True)
    console.print("Ctrl-C stops them")


def stop_all(running: list[Server]) -> None:
    for server in running:
        server.stop()


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers bind: a port whose last user has just gone is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def check_ports(wanted: list[Server], to_start: list[str] | None = None) -> None:
    """Raise if two want the same port, or one that is to start wants a taken one. to_start: all if left out."""
    ports = [server.port for server in wanted]
    if len(set(ports)) < len(ports):
        act = "give two different ports"
        raise ConfigError(Problem(f"both servers would use port {ports[0]}", "--mlflow-port", act=act))
    problems = [
        Problem(
            f"port {server.port} is in use",
            server.name,
            "one server a port",
            f"stop what uses it, or give another: --{server.name.lower()}-port {server.port + 1}",
        )
        for server in wanted
        if (to_start is None or server.name.lower() in to_start) and not port_is_free(server.port)
    ]
    if problems:
        raise InfrastructureError(*problems)


def _answers(url: str, seconds: float) -> bool:
    try:
        # A proxy in the environment must not be asked for a page of this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=seconds) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
