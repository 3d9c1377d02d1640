"""A worker on a full disk: neither its result can be written, nor what went wrong."""

import errno
import os
import sys
from pathlib import Path
from typing import NoReturn

from data_contracts.jobs import Job
from tasks.runtime.workers import harness


def full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def work(job: Job, out: Path) -> dict:
    sys.stderr.write = full
    harness.write_atomically = full
    return {}


if __name__ == "__main__":
    harness.main(work, Job)
