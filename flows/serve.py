"""Serve a registered version over HTTP and follow its alias; the page and the JSON of both."""

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.serving import Assignment, RequestLimits, ServeJob
from data_contracts.run_spec import StoreSpec
from tasks.runtime.console import note
from tasks.serving.endpoint import API_KEY, LOOPBACK, Endpoint, RegistryFollower, parse_model_name, shadow_file

if TYPE_CHECKING:
    from rich.console import Console


_POLL_SECONDS, _TROUBLED_POLL_SECONDS = 2.0, 30.0


@dataclass
class Serving:
    """A server that answers, and the registry it follows."""

    endpoint: Endpoint
    follower: RegistryFollower
    payload: dict[str, Any]
    trouble: str = ""

    def keep(self) -> None:
        """Follow the registry until Ctrl-C. Raises if the server dies on its own."""
        try:
            while True:
                time.sleep(_TROUBLED_POLL_SECONDS if self.trouble else _POLL_SECONDS)
                self.endpoint.check()
                self._poll()
        except KeyboardInterrupt:
            pass
        finally:
            answered = self.endpoint.stop()
        counts = ", ".join(f"{count} by {label}" for label, count in answered.items())
        note(f"answered: {counts or 'nothing'}")

    def _poll(self) -> None:
        """A registry that is away or has no version under the alias changes nothing, and is reported once."""
        changed: Assignment | None = None
        trouble = ""
        try:
            changed = self.follower.poll()
        except Exception as error:  # noqa: BLE001 whatever it is: the version that answers keeps answering
            trouble = f"{type(error).__name__}: {error}"
        if trouble and trouble != self.trouble:
            note(f"the registry: {trouble}; the same version keeps answering")
        self.trouble = trouble
        if changed:
            self.endpoint.serve(changed)


def serve(store: StoreSpec, model: str, host: str, port: int, limits: RequestLimits, shadow: str | None) -> Serving:
    """Start answering. Raises ConfigError if there is no such version, or for an open door without a key."""
    on_loopback = host in LOOPBACK
    if not on_loopback and not os.environ.get(API_KEY):
        act = f"export {API_KEY} with a key of your own; clients send it as their API key"
        raise ConfigError(Problem(f"{host} can be reached by others, and no key is set", "--host", act=act))
    challenger = parse_model_name(shadow, "--shadow") if shadow else None
    served = parse_model_name(model, "serve")
    follower = RegistryFollower(store, served, challenger)
    file = shadow_file(store, served.name) if challenger else None
    first = follower.poll()
    assert first  # the first call finds a version or raises
    if file:
        note(f"shadow: prompts and both answers are kept in {file}, for you alone, personal data masked")
    job = ServeJob(
        assignment=first, host=host, port=port, on_loopback=on_loopback, limits=limits,
        shadow_file=str(file) if file else None,
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)  # Ctrl-C is how a server is ended: it finishes the answers in progress
    endpoint = Endpoint(store, job, note)
    endpoint.start()
    return Serving(endpoint, follower, _payload(endpoint, job))


def _payload(endpoint: Endpoint, job: ServeJob) -> dict[str, Any]:
    served, shadow = job.assignment.served, job.assignment.shadow
    place = f"[{job.host}]" if ":" in job.host else job.host
    return {
        "url": f"http://{place}:{endpoint.port}/v1",
        "model": f"{served.name}@{served.alias}" if served.alias else served.label,
        "version": served.label,
        "shadow": shadow.label if shadow else None,
        "shadow_file": job.shadow_file,
        "limits": job.limits.model_dump(),
    }


def show_serving(payload: dict[str, Any], console: "Console") -> None:
    url, model = payload["url"], payload["model"]
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What do you know?"}}]}}'
    lines = [f"{payload['version']} answers at {url}"]
    lines += [f"  in the shadow: {payload['shadow']}"] if payload["shadow"] else []
    lines += [f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"]
    lines += [f'  OpenAI(base_url="{url}", api_key="none")']
    lines += ["Ctrl-C ends it"]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
