"""Workers in forked children, with one planned fault each. The product has no hooks for it: functions are patched."""

import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tasks.workers.harness import main

_WORK = {"init_adapter": "init_adapter", "train_adapter": "train", "evaluate_models": "evaluate_models"}
# One clean process imports torch once and forks a fresh worker each time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([f"tasks.workers.{name}" for name in _WORK])

Patch = Callable[[], None]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(owner: str, name: str, number: int, fault: Callable[[], None]) -> None:
    """Let `fault` happen as `owner.name` is called for the time `number` (from 1). `owner`: a module or a class in one."""
    module, _, inner = owner.partition(":")
    place = importlib.import_module(module)
    place = getattr(place, inner) if inner else place
    function, calls = getattr(place, name), iter(range(1, sys.maxsize))

    def faulty(*args, **kwargs):
        if next(calls) == number:
            fault()
        return function(*args, **kwargs)

    setattr(place, name, faulty)


def run(worker: str, spec: dict, out: Path, patch: Patch | None = None, seconds: float | None = None) -> int:
    """Run a worker after `patch`, killed after `seconds`; answer with its exit code, negative if a signal ended it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "spec.json").write_text(json.dumps(spec))
    (out / "report.json").unlink(missing_ok=True)
    child = _CONTEXT.Process(target=_work, args=(worker, out, patch))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _work(worker: str, out: Path, patch: Patch | None) -> None:
    with (out / "stdout").open("a") as told:
        sys.stdout, sys.argv = told, [worker, str(out / "spec.json"), str(out)]
        module = importlib.import_module(f"tasks.workers.{worker}")
        if patch:
            patch()
        main(getattr(module, _WORK[worker]))


def told(out: Path, event: str) -> list[dict]:
    """What a worker has said, over all its starts."""
    lines = map(json.loads, (out / "stdout").read_text().splitlines())
    return [line for line in lines if line["event"] == event]
