"""Run a worker as a child process: its memory returns on exit, and what kills it becomes an error with a cause."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_contracts.errors import ERRORS, Problem, TransientError, WorkerError
from data_contracts.jobs import Job
from tasks.runtime.console import page
from tasks.runtime.core.files import write_atomically

_LOG_LINES_SHOWN = 12
_SECONDS_BETWEEN_LINES = 15.0
SECONDS_TO_END = 60.0  # for a worker that was asked to: a step, and a checkpoint
WorkerEvent = dict[str, Any]
Watch = Callable[[WorkerEvent], None]


def _nobody(event: WorkerEvent) -> None:
    pass


@dataclass(frozen=True)
class Launch:
    """How a worker is started and shown."""

    title: str | None = None  # what progress calls it; its module's name if None
    force: bool = False  # from the start, without what an earlier one left
    watch: Watch = _nobody  # gets each of its events
    gpu: str | None = None  # the only one it sees


def run_worker(module: str, job: Job, out: Path, launch: Launch = Launch()) -> dict[str, Any]:
    """Run `python -m module spec.json out/` with live progress on stderr and return its report.

    A worker that has already ended well with the same job is not run again, and a killed one resumes from what it
    left in `out`, unless `launch.force` is set. Raises what the worker raised,
    TransientError if a signal killed it (it resumes from its checkpoint when retried), WorkerError otherwise.
    """
    if launch.force:
        shutil.rmtree(out, ignore_errors=True)
    spec_file, report_file = out / "spec.json", out / "report.json"
    text = json.dumps(job.model_dump(mode="json"), indent=1, sort_keys=True)
    if report_file.exists() and spec_file.exists() and spec_file.read_text() == text:
        return dict(json.loads(report_file.read_text()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "error.json").unlink(missing_ok=True)
    report_file.unlink(missing_ok=True)
    write_atomically(spec_file, text)
    with (
        (out / "worker.log").open("a") as log,
        Display(launch.title or module.rpartition(".")[2].replace("_", " ")) as display,
    ):
        command = [sys.executable, "-m", *_launcher(job), module, str(spec_file), str(out)]
        environment = worker_environment() | ({"CUDA_VISIBLE_DEVICES": launch.gpu} if launch.gpu else {})
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        said: dict[str, WorkerEvent] = {}  # the last of each kind
        try:
            follow(child, display.show, launch.watch, lambda event: said.update({event["event"]: event}))
        finally:
            _end(child)
    if child.returncode != 0:
        raise worker_error(child.returncode, module, out, said.get("error"))
    return dict(json.loads(report_file.read_text()))


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is one that `run_worker` started."""
    try:
        return any(argument.startswith("tasks.") and ".workers." in argument for argument in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def worker_environment() -> dict[str, str]:
    """A worker decides on its threads itself; what the user has set is kept.

    THP_MEM_ALLOC_ENABLE: PyTorch takes large tensors in huge pages, apart from small ones, so that freed memory has no
    holes: 16 % less resident memory in a training step (docs/training.md).
    """
    return {"THP_MEM_ALLOC_ENABLE": "1", **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _launcher(job: Job) -> list[str]:
    """What starts the worker's ranks, if it has several, or if Ray finds their places."""
    if job.on_ray:
        return ["tasks.runtime.workers.launch_ray"]
    return ["tasks.runtime.workers.launch"] if job.processes > 1 else []


def follow(child: "subprocess.Popen[str]", *watching: Watch) -> None:
    """Pass on what a worker says until it ends."""
    assert child.stdout is not None  # asked for with PIPE
    for line in child.stdout:
        _, mark, rest = line.partition('{"event"')  # Ray puts a prefix before it
        if mark:
            event = json.loads(mark + rest)
            for watch in watching:
                watch(event)
    child.wait()


def _end(child: "subprocess.Popen[str]") -> None:
    """No worker outlives its task. One that trains finishes its step and writes a checkpoint first."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=SECONDS_TO_END)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            child.kill()
            child.wait()
    if child.stdout:
        child.stdout.close()


def worker_error(code: int, module: str, out: Path, said: WorkerEvent | None = None) -> Exception:
    """What a worker that ended with this code left as its reason, or said where it had no room for it, as an error of ours."""
    left = out / "error.json"
    if cause := json.loads(left.read_text()) if left.exists() else said:
        return ERRORS[cause["error"]](*(Problem(**problem) for problem in cause["problems"]))
    log = out / "worker.log"
    if code < 0:
        act = "it resumes from its last checkpoint; if memory ran out: lower train.batch_tokens, or free some"
        return TransientError(Problem(f"killed by signal {-code}", module, act=act))
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:])
    return WorkerError(Problem(f"ended with code {code}:\n{tail}", module, act=f"read {log}"))


def free_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Display:
    """A worker's progress on stderr: a bar in a terminal, a line every 15 seconds elsewhere, the first `after` so many.

    Of several workers at the same time each has a bar, and every line begins with whose it is.
    """

    def __init__(self, title: str, after: float = _SECONDS_BETWEEN_LINES) -> None:
        self.title = title
        self.last_line = time.monotonic() + after - _SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        self.bar = _SCREEN.enter()
        self.line = self.bar.add_task(self.title, total=None, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.remove_task(self.line)
        _SCREEN.leave()

    def show(self, event: WorkerEvent) -> None:
        kind = event["event"]
        if kind == "note":
            self._say(event["text"])
        elif kind == "device":
            device = f"{event['device']} ({event['device_reason']}), {event['precision']} ({event['precision_reason']})"
            self._say(f"{device}; {event['threads']} threads ({event['threads_reason']})")
        elif kind == "start" and event["step"]:
            self._say(f"resuming from step {event['step']}")
        elif kind == "step":
            self._advance(self.title, event["step"], event["of"], f"loss {event['loss_nats']:.3f}")
        elif kind == "progress":
            self._advance(event["what"], event["done"], event.get("of"), "")

    def _say(self, text: str) -> None:
        whose = f"{self.title}: " if _SCREEN.shown > 1 else ""
        self._print(f"  {whose}{text}")

    def _print(self, line: str) -> None:
        self.bar.console.print(line, style="dim", markup=False, soft_wrap=True)

    def _advance(self, what: str, done: int, of: int | None, note: str) -> None:
        self.bar.update(self.line, description=what, completed=done, total=of, note=note)
        if self.bar.disable and time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            progress = f"{done} of {of}" if of else f"{done}"
            self._print(f"  {what}: {progress} {note}")


class _Screen:
    """The one live part of the terminal, shared by the workers of several threads: rich keeps one at a time."""

    def __init__(self) -> None:
        self.shown = 0
        self._lock = threading.Lock()

    def enter(self) -> Progress:
        with self._lock:
            if self.shown == 0:
                console = page(sys.stderr)
                self._bar = Progress(
                    TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(),
                    TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=console,
                    transient=True, disable=not console.is_terminal,
                )  # fmt: skip
                self._bar.start()
            self.shown += 1
            return self._bar

    def leave(self) -> None:
        with self._lock:
            self.shown -= 1
            if self.shown == 0:
                self._bar.stop()


_SCREEN = _Screen()
