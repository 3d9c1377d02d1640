"""Workers in forked children, with one planned fault each. The product has no hooks for it: functions are patched."""

import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

from data_contracts.jobs import Job
from data_contracts.jobs.training import TrainJob
from data_contracts.train_spec import TrainSpec
from tasks.runtime.store import digest
from tasks.runtime.workers.harness import main
from tasks.runtime.workers.ranks import MEETING, loopback
from tests.conftest import step0_job, toy_rows, write_rows

_WORK = {
    "init_adapter": ("tasks.models.workers.init_adapter", "make_step0"),
    "train_adapter": ("tasks.training.workers.train_adapter", "train"),
    "evaluate_models": ("tasks.evaluation.workers.evaluate_models", "evaluate_models"),
}
# One clean process imports torch once and forks a new worker each time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([module for module, _ in _WORK.values()])

Patch = Callable[[], None]


SETTINGS = TrainSpec(
    threads=1, max_tokens=256, batch_tokens=256, epochs=2, max_steps=10, learning_rate=1e-2, warmup_ratio=0.1,
    checkpoint_steps=3, max_loss_rise_nats=None, rank=4, dropout=0.1,
)  # fmt: skip
STEP = ("tasks.training.workers.trainer", "scored_losses")  # called once each step, then once to validate
TRAINER = "tasks.training.workers.trainer:PackedTrainer"


def job_on(base: Path, folder: Path, **changes) -> TrainJob:
    """A LoRA arm of ten steps with checkpoints 3, 6, 9 and 10; its files are in `folder`, which needs none of them
    yet."""
    plain = TrainJob(
        method="lora", seed=5, base=base, base_name="tiny", step0=folder / "step0" / "adapter",
        train=folder / "train.jsonl", validation=folder / "validation.jsonl", precision="fp32", threads_reason=None,
        settings=SETTINGS,
    )  # fmt: skip
    return changed(plain, **changes)


def training_job(base: Path, folder: Path, **changes) -> TrainJob:
    """The same with its rows and its step-0 adapter."""
    job = job_on(base, folder, **changes)
    assert run("init_adapter", step0_job(base, dropout=job.settings.dropout), folder / "step0") == 0
    write_rows(job.train, toy_rows(40))
    write_rows(job.validation, toy_rows(6, first=200))
    return job


def changed(job: TrainJob, **changes) -> TrainJob:
    """The job with some of its fields, or of its settings, set otherwise; checked as the worker checks it."""
    own = {name: changes.pop(name) for name in list(changes) if name in TrainJob.model_fields}
    settings = job.settings.model_dump() | changes
    return TrainJob.model_validate(job.model_dump() | {"settings": settings} | own)


def adapter(out: Path) -> str:
    return digest(out / "adapter" / "adapter_model.safetensors")


def report(out: Path) -> dict:
    return dict(json.loads((out / "report.json").read_text()))


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def kill() -> None:
    send(signal.SIGKILL)


def before_call(owner: str, name: str, number: int, fault: Callable[[], None]) -> None:
    """Let `fault` happen as `owner.name` is called for the time `number` (from 1). `owner`: a module or a class in
    one."""
    module, _, inner = owner.partition(":")
    place = importlib.import_module(module)
    place = getattr(place, inner) if inner else place
    function, calls = getattr(place, name), iter(range(1, sys.maxsize))

    def faulty(*args, **kwargs):
        if next(calls) == number:
            fault()
        return function(*args, **kwargs)

    setattr(place, name, faulty)


def run(worker: str, job: Job, out: Path, patch: Patch | None = None, seconds: float | None = None) -> int:
    """Run a worker after `patch`, killed after `seconds`; its exit code, negative if a signal ended it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "spec.json").write_text(job.model_dump_json())
    (out / "report.json").unlink(missing_ok=True)
    child = _CONTEXT.Process(target=_work, args=(worker, out, patch))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def run_together(job: TrainJob, out: Path, patches: dict[int, Patch] | None = None) -> list[int]:
    """Run an arm on its ranks, each after its patch; if one fails all end, as with torchrun. Exit codes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "spec.json").write_text(job.model_dump_json())
    for name in ("report.json", "error.json", "meeting"):
        (out / name).unlink(missing_ok=True)
    children = []
    for rank in range(job.processes):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate wants them, nothing connects there
        environment |= {"GLOO_SOCKET_IFNAME": loopback(), MEETING: str(out / "meeting")}
        children.append(
            _CONTEXT.Process(target=_work, args=("train_adapter", out, (patches or {}).get(rank), environment))
        )
    for child in children:
        child.start()
    while any(child.exitcode is None for child in children) and not any(child.exitcode for child in children):
        multiprocessing.connection.wait([child.sentinel for child in children if child.exitcode is None])
    for child in children:
        child.join(20)
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def _work(worker: str, out: Path, patch: Patch | None, environment: dict[str, str] | None = None) -> None:
    gc.freeze()  # what the parent has imported is no garbage: Trainer collects it as it starts
    os.environ.update(environment or {})
    with (out / "stdout").open("a") as stdout:
        sys.stdout, sys.argv = stdout, [worker, str(out / "spec.json"), str(out)]
        module, function = _WORK[worker]
        imported = importlib.import_module(module)
        if patch:
            patch()
        work = getattr(imported, function)
        main(work, get_type_hints(work)["job"])


def events(out: Path, kind: str) -> list[dict]:
    """What a worker has reported on stdout, over all its starts."""
    lines = map(json.loads, (out / "stdout").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]
