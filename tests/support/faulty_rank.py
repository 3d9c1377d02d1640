"""The training worker with one planned fault in one of its ranks: TUNEGATE_FAULT is RANK:STEP:FAULT."""

import os
import signal
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from data_contracts.jobs.training import TrainJob
from tasks.runtime.workers.harness import main
from tasks.training.workers.train_adapter import train
from tests.support.faults import STEP, before_call


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_all() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def break_down() -> None:
    raise RuntimeError("shapes do not fit")


def no_memory() -> None:
    raise MemoryError("Unable to allocate 2.00 GiB")


FAULTS = {"die": die, "stop_all": stop_all, "break_down": break_down, "no_memory": no_memory}


def faulty(job: TrainJob, out: Path) -> dict:
    rank, step, fault = os.environ["TUNEGATE_FAULT"].split(":")
    if rank == os.environ["RANK"]:
        before_call(*STEP, int(step), FAULTS[fault])
    return train(job, out)


WORK, JOB = faulty, TrainJob

if __name__ == "__main__":
    record(main)(WORK, JOB)
