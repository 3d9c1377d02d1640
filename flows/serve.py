"""Serve a registered version over HTTP and follow its alias; the page and the JSON of both."""

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from data_contracts.errors import ConfigError, Problem
from data_contracts.run_spec import StoreSpec
from tasks.runtime.console import note
from tasks.serving.endpoint import API_KEY, LOOPBACK, Endpoint, Followed, shadow_file, wanted

if TYPE_CHECKING:
    from rich.console import Console


_LOOK_SECONDS, _TROUBLED_SECONDS = 2.0, 30.0


@dataclass
class Serving:
    """A server that answers, and what it follows."""

    endpoint: Endpoint
    followed: Followed
    payload: dict[str, Any]
    trouble: str = ""

    def keep(self) -> None:
        """Follow the registry until somebody has had enough. Raises if the server dies on its own."""
        try:
            while True:
                time.sleep(_TROUBLED_SECONDS if self.trouble else _LOOK_SECONDS)
                self.endpoint.check()
                self._look()
        except KeyboardInterrupt:
            pass
        finally:
            answered = self.endpoint.stop()
        told = ", ".join(f"{count} by {label}" for label, count in answered.items())
        note(f"answered: {told or 'nothing'}")

    def _look(self) -> None:
        """A registry that is away or has nobody under the alias changes nothing, and is told once."""
        try:
            told = self.followed.look()
            trouble = ""
        except Exception as error:  # noqa: BLE001 whatever it is: the version that answers keeps answering
            told, trouble = None, f"{type(error).__name__}: {error}"
        if trouble and trouble != self.trouble:
            note(f"the registry: {trouble}; the same version goes on answering")
        self.trouble = trouble
        if told:
            self.endpoint.serve(told)


def serve(store: StoreSpec, model: str, host: str, port: int, limits: dict[str, int], shadow: str | None) -> Serving:
    """Start answering. Raises ConfigError if there is no such version, or for an open door without a key."""
    on_loopback = host in LOOPBACK
    if not on_loopback and not os.environ.get(API_KEY):
        act = f"export {API_KEY} with a key of your own; clients send it as their API key"
        raise ConfigError(Problem(f"{host} can be reached by others, and no key is set", "--host", act=act))
    beside = wanted(shadow, "--shadow") if shadow else None
    served = wanted(model, "serve")
    followed = Followed(store, served, beside)
    file = shadow_file(store, served.name) if beside else None
    first = followed.look()
    assert first  # the first look finds somebody or raises
    if file:
        note(f"shadow: prompts and both answers are kept in {file}, for you alone, personal data masked")
    spec = first | {
        "host": host, "port": port, "on_loopback": on_loopback, "limits": limits,
        "shadow_file": str(file) if file else None,
    }  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)  # Ctrl-C is how a server is ended: it answers what was asked
    endpoint = Endpoint(store, spec, note)
    endpoint.start()
    return Serving(endpoint, followed, _payload(endpoint, spec, host))


def _payload(endpoint: Endpoint, spec: dict[str, Any], host: str) -> dict[str, Any]:
    served = spec["served"]
    place = f"[{host}]" if ":" in host else host
    return {
        "url": f"http://{place}:{endpoint.port}/v1",
        "model": f"{served['name']}@{served['alias']}" if served["alias"] else f"{served['name']}/{served['version']}",
        "version": f"{served['name']}/{served['version']}",
        "shadow": spec["shadow"] and f"{spec['shadow']['name']}/{spec['shadow']['version']}",
        "shadow_file": spec["shadow_file"],
        "limits": spec["limits"],
    }


def show_serving(payload: dict[str, Any], console: "Console") -> None:
    url, model = payload["url"], payload["model"]
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What do you know?"}}]}}'
    lines = [f"{payload['version']} answers at {url}"]
    lines += [f"  beside it, in the shadow: {payload['shadow']}"] if payload["shadow"] else []
    lines += [f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"]
    lines += [f'  OpenAI(base_url="{url}", api_key="none")']
    lines += ["Ctrl-C ends it"]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
