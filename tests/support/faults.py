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

from data_contracts.train_spec import TrainSpec
from tasks.runtime.store import digest
from tasks.runtime.workers.harness import main
from tasks.runtime.workers.ranks import MEETING, loopback
from tests.conftest import LORA, toy_rows, write_rows

_WORK = {
    "init_adapter": ("tasks.models.workers.init_adapter", "init_adapter"),
    "train_adapter": ("tasks.training.workers.train_adapter", "train"),
    "evaluate_models": ("tasks.evaluation.workers.evaluate_models", "evaluate_models"),
}
# One clean process imports torch once and forks a fresh worker each time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([module for module, _ in _WORK.values()])

Patch = Callable[[], None]


SETTINGS = TrainSpec().model_dump() | {
    "base_name": "tiny", "precision": "fp32", "threads": 1, "max_tokens": 256, "too_long": "leave_out",
    "batch_tokens": 256, "epochs": 2, "seed": 5, "max_steps": 10, "learning_rate": 1e-2, "warmup_ratio": 0.1,
    "weight_decay": 0.0, "max_grad_norm": 1.0, "optimizer": "adamw_torch", "activation_checkpointing": False,
    "checkpoint_steps": 3, "validation_steps": None, "early_stopping_patience": None, "max_loss_rise_nats": None,
    "rank": 4, "target_modules": "all-linear", "dropout": 0.1,
}  # fmt: skip
STEP = ("tasks.training.workers.trainer", "scored_losses")  # called once each step, then once to validate
TRAINER = "tasks.training.workers.trainer:PackedTrainer"


def training_spec(base: Path, folder: Path, dropout: float = 0.1) -> dict:
    """A spec of ten steps with checkpoints 3, 6, 9 and 10."""
    settings = {
        "base": str(base),
        "seed": 5,
        "rank": 4,
        "alpha": 8,
        "dropout": dropout,
        "target_modules": "all-linear",
    } | LORA
    assert run("init_adapter", settings, folder / "step0") == 0
    return SETTINGS | {
        "method": "lora",
        "base": str(base),
        "step0": str(folder / "step0" / "adapter"),
        "train": str(write_rows(folder / "train.jsonl", toy_rows(40))),
        "validation": str(write_rows(folder / "validation.jsonl", toy_rows(6, first=200))),
    }


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


def run_together(spec: dict, out: Path, patches: dict[int, Patch] | None = None) -> list[int]:
    """Run an arm on `spec["workers"]` ranks, each after its patch; if one fails all end, as with torchrun. Exit codes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "spec.json").write_text(json.dumps(spec))
    for name in ("report.json", "error.json", "meeting"):
        (out / name).unlink(missing_ok=True)
    children = []
    for rank in range(spec["workers"]):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(spec["workers"])}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate wants them, nobody goes there
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
    with (out / "stdout").open("a") as told:
        sys.stdout, sys.argv = told, [worker, str(out / "spec.json"), str(out)]
        module, function = _WORK[worker]
        imported = importlib.import_module(module)
        if patch:
            patch()
        work = getattr(imported, function)
        main(work, get_type_hints(work).get("job"))


def told(out: Path, event: str) -> list[dict]:
    """What a worker has said, over all its starts."""
    lines = map(json.loads, (out / "stdout").read_text().splitlines())
    return [line for line in lines if line["event"] == event]
