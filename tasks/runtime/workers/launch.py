"""Start a training worker on several ranks: `python -m tasks.runtime.workers.launch MODULE spec.json out/`.

torchrun's own agent starts them and ends all if one fails. The ranks meet by a file and talk on the loopback interface:
torchrun's command would listen on every one. What any rank broke on ends up in `out/error.json`.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data_contracts.errors import ConfigError, Problem, TransientError, TunegateError, WorkerError
from data_contracts.jobs.training import TrainJob
from tasks.runtime.workers.device import free_threads
from tasks.runtime.workers.harness import write_error
from tasks.runtime.workers.ranks import MEETING, loopback

_SECONDS_TO_END = 55  # a step and a checkpoint; the parent waits 60


def launch_ranks(module: str, spec_file: Path, out: Path) -> int:
    """Exit code: 0 if all ranks ended well."""
    job = TrainJob.model_validate_json(spec_file.read_bytes())
    (out / "error.json").unlink(missing_ok=True)
    if 0 < torch.cuda.device_count() < job.processes:
        limit = f"{torch.cuda.device_count()} GPUs"
        write_error(out, ConfigError(Problem("each worker needs a GPU of its own", "train.workers", limit, "lower it")))
        return ConfigError.exit_code
    with tempfile.TemporaryDirectory(prefix="tunegate-") as folder:
        os.environ.update(_environment(job.processes, job.settings.threads, Path(folder)))
        config = LaunchConfig(
            run_id=out.name, min_nodes=1, max_nodes=1, nproc_per_node=job.processes, max_restarts=0, local_addr="127.0.0.1",
            rdzv_backend="c10d", rdzv_endpoint=str(Path(folder) / "agent"), rdzv_configs={"store_type": "file"},
            shutdown_timeout=_SECONDS_TO_END,
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-u", "-m", module, str(spec_file), str(out))
        except ChildFailedError as error:
            return _failed(error.failures, job.processes, out)
        except SignalException as error:
            return -int(error.sigval) if not (out / "error.json").exists() else TransientError.exit_code
    return 0


def _environment(ranks: int, threads: int | None, folder: Path) -> dict[str, str]:
    """What every rank finds in its environment."""
    share = (
        {}
        if threads or "OMP_NUM_THREADS" in os.environ
        else {"OMP_NUM_THREADS": str(max(1, free_threads()[0] // ranks))}
    )
    return {
        MEETING: str(folder / "ranks"),
        "GLOO_SOCKET_IFNAME": loopback(),
        "NCCL_SOCKET_IFNAME": loopback(),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # it would listen everywhere, and the ranks need none
        "TORCHELASTIC_LOG_LEVEL": "ERROR",
        **share,
    }


def _failed(failures: dict[int, ProcessFailure], ranks: int, out: Path) -> int:
    """One error for all ranks: the one that a rank has left, a signal that killed one, or what one broke on first."""
    if not (out / "error.json").exists():
        write_error(out, _cause(failures, ranks))
    return TunegateError.exit_code


def _cause(failures: dict[int, ProcessFailure], ranks: int) -> TunegateError:
    killed = [
        (rank, failure) for rank, failure in failures.items() if failure.exitcode in (-signal.SIGKILL, -signal.SIGBUS)
    ]
    if killed:
        rank, failure = killed[0]
        act = "it resumes from its last checkpoint; if memory ran out: lower train.batch_tokens, or free some"
        return TransientError(Problem(f"killed by signal {-failure.exitcode}", f"rank {rank} of {ranks}", act=act))
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    message: Any = failure.message
    what = message.get("message", message) if isinstance(message, dict) else message
    return WorkerError(
        Problem(f"ended with code {failure.exitcode}: {what}", f"rank {rank} of {ranks}", act="read worker.log")
    )


if __name__ == "__main__":
    code = launch_ranks(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    if code < 0:  # as a worker that runs alone
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
