"""Places for arms that train at the same time: a GPU each, an equal share of the free cores, or wherever Ray puts
them."""

import json
import os
import subprocess
import sys
from typing import Any

from data_contracts.errors import ConfigError, Problem, WorkerError
from data_contracts.reports import Slot
from data_contracts.train_spec import TrainSpec
from tasks.runtime.processes import free_cores, worker_environment

_SECONDS = 120


def slots_of(train: TrainSpec) -> list[Slot]:
    """One for each arm of a group, all with the same threads; none if arms train one after the other.

    Raises ConfigError if there are too few GPUs, or cores, or no cluster.
    """
    if train.parallel == 1:
        return []
    if train.engine == "ray":
        return on_cluster(train, os.environ.get("RAY_ADDRESS"))
    found = _devices()
    gpus = visible_gpus(found["gpus"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    return share_out(train, gpus, found["threads"], free_cores())


def share_out(train: TrainSpec, gpus: list[str], free: int, cores: int) -> list[Slot]:
    """gpus: names of the visible ones; free: free cores, of `cores`."""
    arms, threads = train.parallel, train.threads or max(1, free // train.parallel)
    if gpus and arms > len(gpus):
        limit, act = f"{len(gpus)} visible GPUs", f"set it to {len(gpus)}"
        raise ConfigError(Problem(f"{arms} arms at a time need a GPU each", "train.parallel", limit, act))
    if not gpus and arms * threads > cores:
        what = f"{arms} arms at a time on {threads} threads each: a second thread on a core costs more than it gives"
        act = f"lower train.threads, or set train.parallel to {max(1, cores // threads)}"
        raise ConfigError(Problem(what, "train.parallel", f"{cores} cores", act))
    share = f"the share of each of {arms} arms in {free} free cores"
    why = "set by train.threads" if train.threads else share
    return [Slot(gpu=gpus[n] if gpus else None, threads=threads, why=why, arms_at_once=arms) for n in range(arms)]


def on_cluster(train: TrainSpec, address: str | None) -> list[Slot]:
    """Ray gives each arm's workers their GPU or cores as they become free, so only their number is known here."""
    if not address:
        what = "without RAY_ADDRESS each arm would start a cluster of its own, on the same cores"
        act = "ray start --head on one machine, then set RAY_ADDRESS to what it prints; or set train.parallel to 1"
        raise ConfigError(Problem(what, "train.parallel", act=act))
    why = "set by train.threads" if train.threads else "the cores that an arm asks Ray for where train.threads is null"
    return [Slot(gpu=None, threads=train.threads or 1, why=why, arms_at_once=train.parallel)] * train.parallel


def visible_gpus(count: int, named: str | None) -> list[str]:
    """The first `count` GPUs by the names that CUDA_VISIBLE_DEVICES has for them: numbers, or UUIDs."""
    names = [name.strip() for name in named.split(",")] if named else [str(number) for number in range(count)]
    return names[:count]


def _devices() -> dict[str, Any]:
    """Found by a child process: torch stays out of this one."""
    command = [sys.executable, "-m", "tasks.runtime.workers.device"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=True, env=worker_environment()
        )
        return dict(json.loads(done.stdout))
    except (subprocess.SubprocessError, ValueError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        what = f"torch does not start: {lines[-1] if lines else error}"
        raise WorkerError(Problem(what, "tasks.runtime.workers.device", act="tunegate doctor")) from error
