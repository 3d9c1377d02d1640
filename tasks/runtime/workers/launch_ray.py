"""Start a training worker's ranks on a Ray cluster: `python -m tasks.runtime.workers.launch_ray MODULE spec.json out/`.

Ray Train places the ranks and lets them meet. Every machine must see the store and the code under the same path. The
ranks' events come through Ray's own log to this process's stdout, with a prefix.
"""

import importlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError, Problem, TransientError, TunegateError, WorkerError
from data_contracts.jobs.training import TrainJob
from tasks.runtime.workers.harness import write_error
from tasks.runtime.workers.ranks import loopback

_STATE = "ray-train"  # Ray's own records: of no use once it ended
_SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's name for it: with 0, a cluster that it starts itself is for this machine and listens on loopback alone."""
_PEER_GONE = re.compile("closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)
"""Messages of gloo and NCCL on the ranks that are left."""


def launch_on_ray(module: str, spec_file: Path, out: Path) -> int:
    """Exit code: 0 if all ranks ended well."""
    (out / "error.json").unlink(missing_ok=True)
    wanted = (
        _SILENT if os.environ.get("RAY_ADDRESS") else _SILENT | {_ONE_MACHINE: "0", "GLOO_SOCKET_IFNAME": loopback()}
    )
    os.environ.update({name: os.environ.get(name, value) for name, value in wanted.items()})
    try:
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError
    except ImportError as error:
        act = "pip install 'tunegate[ray]'"
        missing = Problem(f"Ray Train is not installed ({error})", "train.engine", "local or ray", act)
        return _leave(out, ConfigError(missing))
    shutil.rmtree(out / _STATE, ignore_errors=True)
    try:
        _fit(module, spec_file.resolve(), out.resolve())
    except (TrainingFailedError, RayError, ConnectionError) as error:
        return _leave(out, _cause(error, module))
    finally:
        shutil.rmtree(out / _STATE, ignore_errors=True)
    return 0


def _cause(error: Exception, module: str) -> TunegateError:
    """What a rank raised, which it would raise again; TransientError if a rank's process is gone, or the cluster.

    Ray reports a process that is gone as an error of its own, and its peers may report that they lost it.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    raised = {rank: failure for rank, failure in failures.items() if not _is_loss(failure)}
    if raised and len(raised) == len(failures):
        rank, failure = next(iter(raised.items()))
        what = f"{type(failure).__name__}: {_line(failure)}"
        return WorkerError(Problem(what, f"rank {rank}", act="read worker.log"))
    act = "it resumes from its last checkpoint"
    return TransientError(Problem(f"Ray ended it: {_line(error)}", module, act=act))


def _is_loss(failure: Exception) -> bool:
    return type(failure).__module__.startswith("ray.") or _PEER_GONE.search(str(failure)) is not None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def _fit(module: str, spec_file: Path, out: Path) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    job = TrainJob.model_validate_json(spec_file.read_bytes())
    ray.init(include_dashboard=False, log_to_driver=True)
    cluster: Any = ray.cluster_resources  # untyped
    on_gpus = cluster().get("GPU", 0) >= job.processes
    resources = {"CPU": job.settings.threads or 1} | ({"GPU": 1} if on_gpus else {})
    TorchTrainer(
        _rank,
        train_loop_config={"module": module, "spec": str(spec_file), "out": str(out)},
        scaling_config=ScalingConfig(num_workers=job.processes, use_gpu=on_gpus, resources_per_worker=resources),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo"),
        run_config=RunConfig(name=_STATE, storage_path=str(out), failure_config=FailureConfig(max_failures=0)),
    ).fit()


def _rank(config: dict[str, Any]) -> None:
    """One rank, in a process of Ray's."""
    from tasks.runtime.workers.harness import run_job

    worker = importlib.import_module(config["module"])
    run_job(worker.WORK, worker.JOB, Path(config["spec"]), Path(config["out"]))


def _leave(out: Path, error: TunegateError) -> int:
    if not (out / "error.json").exists():
        write_error(out, error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(launch_on_ray(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
