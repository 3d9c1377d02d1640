"""Answer over HTTP with registered versions: `python -m tasks.serving.workers.serve_model spec.json out/`.

Each line on stdin is an Assignment: the versions to serve from now on. The end of stdin is the end of the server: it finishes
the answers in progress and exits. So no server outlives the process that started it.
"""

import asyncio
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import uvicorn

from data_contracts.errors import InfrastructureError, Problem
from data_contracts.jobs.serving import Assignment, ServeJob, ServeReport
from tasks.runtime.workers.device import choose_device
from tasks.runtime.workers.harness import main, say
from tasks.serving.workers.generation import Answer
from tasks.serving.workers.model_pool import ModelPool
from tasks.serving.workers.openai_api import build_app
from tasks.serving.workers.openai_requests import ChatRequest
from tasks.serving.workers.shadow import Shadow

_SECONDS_TO_ANSWER = 30  # for those that wait when the server ends


def serve_models(job: ServeJob, out: Path) -> dict[str, Any]:
    """Serve until stdin ends: a ServeReport."""
    device = choose_device()
    say("note", text=f"{device.device}, {device.threads} threads ({device.threads_reason})")
    listener = _bind(job.host, job.port)
    pool = ModelPool(job.assignment)
    shadow = Shadow(pool, Path(job.shadow_file)) if job.shadow_file else None
    answered: Counter[str] = Counter()

    def on_answer(request: ChatRequest, answer: Answer, text: str) -> None:
        answered[answer.loaded.label] += 1
        if shadow:
            shadow.add(request, answer, text)

    app = build_app(pool, job.limits, on_answer, on_loopback=job.on_loopback)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_SECONDS_TO_ANSWER
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_quietly)  # uvicorn ends in order on either, then raises it again
    asyncio.run(_run(uvicorn.Server(config), listener, pool, shadow))
    return ServeReport(answered=dict(answered)).model_dump(mode="json")


async def _run(server: uvicorn.Server, listener: socket.socket, pool: ModelPool, shadow: Shadow | None) -> None:
    background = [asyncio.create_task(_follow_stdin(server, pool))]
    if shadow:
        background.append(asyncio.create_task(shadow.run()))
    say("ready", port=listener.getsockname()[1], label=pool.served.label)
    await server.serve(sockets=[listener])
    for task in background:
        task.cancel()


async def _follow_stdin(server: uvicorn.Server, pool: ModelPool) -> None:
    """Serve the versions named on stdin, until it ends."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        await pool.change(Assignment.model_validate_json(line))
    server.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    """Take the port first: if it is in use, no weights are read for nothing."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        what = f"port {port} of {host} cannot be used: {error.strerror}"
        raise InfrastructureError(Problem(what, "--port", act="stop what uses it, or name another port")) from error


def _end_quietly(number: int, frame: object) -> None:
    pass


if __name__ == "__main__":
    main(serve_models, ServeJob)
