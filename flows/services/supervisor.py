"""supervisord keeps the services alive: its configuration, and a client for its socket in the store."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil

from data_contracts.errors import InfrastructureError, Problem

_SOCKET = "supervisor.sock"
_LONGEST_SOCKET = (
    95  # bytes; a unix socket's path has 107, on macOS 103, and supervisord makes one with its pid appended
)
_START_SECONDS = 20.0
_ALREADY_STARTED = 60  # a fault of supervisord
_DO_NOT_WAIT = False
IDLE = ("STOPPED", "EXITED", "FATAL")
"""States of a program that supervisord does not start again."""

# Files are named from its working directory, which is where this file is: paths with a % would need escapes, twice.
_HEAD = """\
; Written by `tunegate up`; `tunegate down` stops what it names.
[unix_http_server]
file=supervisor.sock
chmod=0700
[supervisord]
logfile=supervisord.log
logfile_maxbytes=5MB
logfile_backups=1
pidfile=supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
# A program that ended is started again, however it ended; one that cannot start is given up after ten tries.
_PROGRAM = """\
[program:{name}]
command={command}
priority={priority}
autostart=false
autorestart=true
startsecs=5
startretries=10
stopsignal=TERM
stopwaitsecs=20
stopasgroup={group}
killasgroup={group}
redirect_stderr=true
stdout_logfile={name}.log
stdout_logfile_maxbytes=5MB
stdout_logfile_backups=2
environment={environment}
"""


@dataclass(frozen=True)
class Program:
    """group: its child processes get its signals too."""

    name: str
    command: list[str]
    group: bool = True
    environment: str = ""


@dataclass(frozen=True)
class Process:
    """A program as supervisord sees it."""

    name: str
    state: str  # RUNNING, STARTING, BACKOFF, FATAL, EXITED, STOPPED, STOPPING
    pid: int
    started_unix_seconds: float


def configuration(programs: Sequence[Program]) -> str:
    """Programs in the order in which they need each other: they are stopped in the reverse one."""
    parts = [
        _PROGRAM.format(
            name=program.name,
            command=shlex.join(program.command).replace("%", "%%"),
            priority=priority,
            group=str(program.group).lower(),
            environment=program.environment,
        )
        for priority, program in enumerate(programs, 1)
    ]
    return _HEAD + "".join(parts)


class Supervisor:
    """The supervisord of one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "supervisord.conf"
        self.socket = folder / _SOCKET

    def is_up(self) -> bool:
        try:
            self._ask("getState")
        except (OSError, Fault):
            return False
        return True

    def start(self, environment: dict[str, str]) -> None:
        """Start it as a daemon. It outlives this process and its terminal."""
        if len(os.fsencode(self.socket)) > _LONGEST_SOCKET:
            act = "keep the store in a shorter path: --set store.root=DIR"
            limit = f"{_LONGEST_SOCKET} bytes, for the unix socket in it"
            raise InfrastructureError(Problem("the store's path is too long", str(self.socket), limit, act))
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.file)]
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)
        deadline = time.monotonic() + _START_SECONDS
        while done.returncode == 0 and time.monotonic() < deadline:
            if self.is_up():
                return
            time.sleep(0.1)
        reason = (done.stderr + done.stdout).strip().splitlines()[-1:] or ["it does not answer"]
        act = f"read {self.folder / 'supervisord.log'}"
        raise InfrastructureError(Problem(f"supervisord did not start: {reason[0]}", str(self.file), act=act))

    def programs(self) -> dict[str, Process]:
        """Empty if no supervisord answers."""
        try:
            found = self._ask("getAllProcessInfo")
        except (OSError, Fault):
            return {}
        return {item["name"]: Process(item["name"], item["statename"], item["pid"], item["start"]) for item in found}

    def start_program(self, name: str) -> None:
        try:
            self._ask("startProcess", name, _DO_NOT_WAIT)
        except Fault as fault:
            if fault.faultCode != _ALREADY_STARTED:
                raise InfrastructureError(Problem(f"cannot be started: {fault.faultString}", name)) from fault

    def shut_down(self) -> None:
        """Ask it to stop every program, the last one first, and itself."""
        self._ask("shutdown")

    def pid(self) -> int:
        return int(self._ask("getPID"))

    def _ask(self, method: str, *arguments: Any) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(serverurl=f"unix://{self.socket}")
        with ServerProxy("http://localhost", transport=transport) as server:
            return getattr(server.supervisor, method)(*arguments)


def end(processes: Sequence[psutil.Process], seconds: float) -> None:
    """SIGTERM, and after `seconds` SIGKILL."""
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            try:
                ask(process)
            except psutil.NoSuchProcess:
                continue
        processes = psutil.wait_procs(processes, timeout=seconds)[1]
        if not processes:
            return
