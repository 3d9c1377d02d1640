"""How every worker runs: `python -m tasks.SUBJECT.workers.NAME spec.json out/`.

It reads its job as the one typed model of that worker (data_contracts/jobs), keeps other workers out of `out/`, reports
its progress as JSON lines on stdout, and ends with `out/report.json` (complete or absent). What fails with a known
cause (ours, or in the table of data_contracts/retry_table.py) ends with its exit code and `out/error.json`. Where several
ranks do one worker's work, the first one writes the progress, the lock and the report; an error is written by the rank
that has it first.
"""

import dataclasses
import gc
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from data_contracts.errors import Problem, TransientError, TunegateError
from data_contracts.jobs import Job
from data_contracts.redaction import without_secrets
from data_contracts.retry_table import explained
from tasks.runtime.core.files import exclusive, write_atomically

_LOCK_SECONDS = 60.0

J = TypeVar("J", bound=Job)
_Work = Callable[[J, Path], dict[str, Any]]


def say(event: str, **values: object) -> None:
    """Send the parent an event, as one JSON line. A parent that is gone ends the worker with BrokenPipeError."""
    if not is_first_rank():
        return
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def is_first_rank() -> bool:
    """Whether this process reports for its worker: it does all of the work, or is rank 0 of those that share it."""
    return os.environ.get("RANK", "0") == "0"


def main(work: _Work[J], job: type[J]) -> None:
    """Run one worker from the command line's two arguments and exit with its code."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m tasks.SUBJECT.workers.NAME spec.json out/")
    gc.freeze()  # what was imported stays
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an end by signal, as SIGTERM is: no traceback of KeyboardInterrupt
    try:
        run_job(work, job, Path(sys.argv[1]), Path(sys.argv[2]))
    except TunegateError as error:
        _log(f"{error}\n")
        sys.exit(error.exit_code)


def run_job(work: _Work[J], job: type[J], spec_file: Path, out: Path) -> None:
    """Do the work of a job file. An error with a known cause is left in `out` and raised as one of ours."""
    out.mkdir(parents=True, exist_ok=True)
    if "RANK" not in os.environ:
        (out / "error.json").unlink(missing_ok=True)
    _be_quiet()
    what = "another worker is still busy here"
    busy = TransientError(Problem(what, str(out), f"{_LOCK_SECONDS:.0f} s", "wait for it or end it"))
    try:
        with exclusive(out / ".lock", busy, seconds=_LOCK_SECONDS) if is_first_rank() else nullcontext():
            report = work(job.model_validate_json(spec_file.read_bytes()), out)
            if is_first_rank():
                write_atomically(out / "report.json", json.dumps(report, indent=1))
    except TunegateError as error:
        write_error(out, error)
        raise
    except Exception as error:
        known = explained(error, out)
        if known is None:
            raise
        _log(without_secrets(traceback.format_exc()))
        write_error(out, known)
        raise known from None


def write_error(out: Path, error: TunegateError) -> None:
    """Leave the error for the parent. If a rank has left one already, that is the cause and stays."""
    left = {"error": type(error).__name__, "problems": [dataclasses.asdict(problem) for problem in error.problems]}
    draft = out / f"error.{os.getpid()}"
    try:
        write_atomically(draft, json.dumps(left, indent=1))
        with suppress(FileExistsError):
            os.link(draft, out / "error.json")
        draft.unlink()
    except OSError:  # a full disk has no room for it: the pipe to the parent needs none
        say("error", **left)


def _log(text: str) -> None:
    """Into the worker's log, if there is room."""
    with suppress(OSError):
        sys.stderr.write(text)


def _be_quiet() -> None:
    # The worker's log is read when something broke: library chatter would bury the cause.
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
