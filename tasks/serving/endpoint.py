"""A server for a registered version: a worker process holds the model; this side follows the registry and names the version.

The worker's stdin names the versions to serve and is its lifeline: when this process is gone, however it ended, so is the
worker.
"""

import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.serving import Assignment, ServedVersion, ServeJob, ServeReport
from data_contracts.run_spec import StoreSpec
from tasks.release.registry import CHAMPION, Registered, alias_version, resolve
from tasks.runtime.mlflow_client import connect
from tasks.runtime.processes import Display, Watch, WorkerEvent, follow, worker_environment, worker_error
from tasks.runtime.store import Store

API_KEY = "TUNEGATE_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MODULE = "tasks.serving.workers.serve_model"
_SECONDS_TO_END = 40.0


def shadow_file(store: StoreSpec, name: str) -> Path:
    """Where the answers of a model and of its challenger are kept, a line for each question."""
    return Store.of(store).files.resolve() / "shadow" / f"{name}.jsonl"


@dataclass(frozen=True)
class ModelName:
    """A model as a user names it: NAME (its champion), NAME@ALIAS or NAME/VERSION."""

    name: str
    alias: str | None = None
    version: str | None = None

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"


def parse_model_name(text: str, option: str) -> ModelName:
    """Read a name. Raises ConfigError for what cannot be one. option: where the user wrote it."""
    plain = text.removeprefix("models:/")
    name, at, label = plain.partition("@") if "@" in plain else plain.partition("/")
    if not name or (at and not label):
        act = "NAME, NAME@champion or NAME/3"
        raise ConfigError(Problem(f"not a model: {text!r}", option, act=act))
    if not at:
        return ModelName(name, alias=CHAMPION)
    return ModelName(name, alias=label) if at == "@" else ModelName(name, version=label)


class RegistryFollower:
    """Resolves the names of the served version and its shadow, again and again."""

    def __init__(self, store: StoreSpec, served: ModelName, shadow: ModelName | None = None) -> None:
        self._store, self._client = store, connect(store)
        self._served, self._shadow = served, shadow
        self._seen: tuple[str | None, str | None] | None = None

    def poll(self) -> Assignment | None:
        """The versions to serve, if they have changed since the last call. Raises ConfigError if there is no such version."""
        seen = (self._version(self._served), self._version(self._shadow) if self._shadow else None)
        if seen == self._seen:
            return None
        served = _served_version(resolve(self._store, self._served.uri, "serve"), self._served)
        shadow = self._shadow and _served_version(resolve(self._store, self._shadow.uri, "--shadow"), self._shadow)
        self._seen = seen
        if shadow and shadow.label == served.label:
            shadow = None  # the challenger has become champion, or is not trained yet
        return Assignment(served=served, shadow=shadow)

    def _version(self, one: ModelName) -> str | None:
        return alias_version(self._client, one.name, one.alias) if one.alias else one.version


def _served_version(found: Registered, name: ModelName) -> ServedVersion:
    return ServedVersion(
        name=found.name,
        version=found.version,
        alias=name.alias,
        adapter_folder=found.adapter.folder,
        meta_file=str(Path(found.adapter.folder).with_name("meta.json")),
        adapter_sha256=found.adapter.sha256,
    )


class Endpoint:
    """A worker that answers over HTTP, on `port` once it has started."""

    def __init__(self, store: StoreSpec, job: ServeJob, log: Callable[[str], None], key: str | None = None) -> None:
        """log: gets what changes, a line each. key: what clients must show; if left out that of the environment, if there is one."""
        self._job, self._log = job, log
        place = Store.of(store)
        self.out = place.files / "serving" / uuid.uuid4().hex
        self._environment = {"TUNEGATE_STORE_DIR": str(place.root.resolve())} | worker_environment()
        self._environment |= {API_KEY: key} if key else {}
        self._changed = threading.Event()
        self.port: int | None = None

    def start(self) -> None:
        """Return when it answers. Raises what the worker raised."""
        self.out.mkdir(parents=True)
        spec_file = self.out / "spec.json"
        spec_file.write_text(self._job.model_dump_json(indent=1))
        command = [sys.executable, "-m", _MODULE, str(spec_file), str(self.out)]
        with (self.out / "worker.log").open("w") as log:
            # Its own session: Ctrl-C reaches only us, and we end it in order.
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        try:
            with Display("loading the model") as display:
                self._reader = threading.Thread(target=self._follow, args=[display.show], daemon=True)
                self._reader.start()
                self._changed.wait()
            self.check()
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raise what the worker ended with, if it has ended on its own."""
        if self.child.poll() is not None:
            raise worker_error(self.child.returncode, _MODULE, self.out)

    def serve(self, assignment: Assignment) -> None:
        """Serve these versions from now on. The worker keeps the old ones if it cannot load them."""
        assert self.child.stdin is not None  # asked for with PIPE
        self.child.stdin.write(assignment.model_dump_json() + "\n")
        self.child.stdin.flush()

    def stop(self) -> dict[str, int]:
        """End it after the answers in progress. Returns how many answers it gave, by version."""
        self.child.terminate()
        try:
            self.child.wait(timeout=_SECONDS_TO_END)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.child.kill()
            self.child.wait()
        self._reader.join()
        report = self.out / "report.json"
        if not report.exists():
            return {}  # what is left is kept: its log says why
        answered = ServeReport.model_validate_json(report.read_text()).answered
        shutil.rmtree(self.out)
        return answered

    def _follow(self, show: Watch) -> None:
        with self.child:  # at its end its pipes are closed
            follow(self.child, show, self._on_event)
        self._changed.set()  # it may have ended before it was ready

    def _on_event(self, event: WorkerEvent) -> None:
        if event["event"] == "ready":
            self.port = event["port"]
            self._changed.set()
        elif event["event"] == "serves":
            shadow = f"; in the shadow: {event['shadow']}" if event["shadow"] else ""
            self._log(f"now {event['label']} answers{shadow}")
        elif event["event"] == "kept":
            self._log(f"{event['text']}; {event['label']} keeps answering")
