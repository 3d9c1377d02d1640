"""Answer over HTTP with registered versions: `python -m tasks.serving.workers.serve_model spec.json out/`.

spec: served, shadow (a version or None, as tasks.serving.workers.model_pool tells), host, port (0: a free one), on_loopback, limits (prompt_tokens,
answer_tokens, requests), shadow_file (None: no shadow). Each line on stdin, `{"served": ..., "shadow": ...}`, says whom to serve from now on.
The end of stdin is the end of the server: it answers what was asked, and goes. So none outlives whoever started it.
report: requests answered, by version.
"""

import asyncio
import json
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import uvicorn

from data_contracts.errors import InfrastructureError, Problem
from tasks.runtime.workers.device import choose_device
from tasks.runtime.workers.harness import main, say
from tasks.serving.workers.generation import Answer
from tasks.serving.workers.model_pool import Voices
from tasks.serving.workers.openai_api import Limits, build_app
from tasks.serving.workers.openai_requests import ChatRequest
from tasks.serving.workers.shadow import Shadow

_SECONDS_TO_ANSWER = 30  # for those that wait when the server ends


def serve(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    device = choose_device()
    say("note", text=f"{device.device}, {device.threads} threads ({device.threads_reason})")
    bound = _bind(spec["host"], spec["port"])
    voices = Voices(spec["served"], spec["shadow"])
    shadow = Shadow(voices, Path(spec["shadow_file"])) if spec["shadow_file"] else None
    answered: Counter[str] = Counter()

    def heard(asked: ChatRequest, answer: Answer, text: str) -> None:
        answered[answer.voice.label] += 1
        if shadow:
            shadow.hear(asked, answer, text)

    app = build_app(voices, Limits(**spec["limits"]), spec["on_loopback"], heard)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_SECONDS_TO_ANSWER
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_quietly)  # uvicorn ends in order on either, then raises it again
    asyncio.run(_answer(uvicorn.Server(config), bound, voices, shadow))
    return {"answered": dict(answered)}


async def _answer(server: uvicorn.Server, bound: socket.socket, voices: Voices, shadow: Shadow | None) -> None:
    beside = [asyncio.create_task(_follow(server, voices))]
    if shadow:
        beside.append(asyncio.create_task(shadow.run()))
    say("ready", port=bound.getsockname()[1], label=voices.served.label)
    await server.serve(sockets=[bound])
    for task in beside:
        task.cancel()


async def _follow(server: uvicorn.Server, voices: Voices) -> None:
    """Serve whom stdin names, until it ends."""
    told = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
    while line := await told.readline():
        await voices.change(**json.loads(line))
    server.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    """A port of one's own, before the weights are read for nothing."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        what = f"port {port} of {host} cannot be used: {error.strerror}"
        raise InfrastructureError(Problem(what, "--port", act="stop what uses it, or name another port")) from error


def _end_quietly(number: int, frame: object) -> None:
    pass


if __name__ == "__main__":
    main(serve)
