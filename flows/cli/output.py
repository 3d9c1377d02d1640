"""Command output: one JSON object or a page for people on stdout, everything else on stderr."""

import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from data_contracts.errors import Problem, TunegateError
from data_contracts.redaction import without_secrets
from data_contracts.retry_table import explained

if TYPE_CHECKING:  # rich takes 0.1 s to import, which `--help` need not wait for
    from psutil import Process
    from rich.console import Console
from tasks.runtime.console import page

EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}
USAGE, INTERRUPTED = 2, 130
_STOP_SECONDS = 3.0


@dataclass(frozen=True)
class Outcome:
    """The result of a command: as JSON, as a page, as an exit code; `then` runs after it is printed."""

    payload: dict[str, Any]
    show: Callable[["Console"], None]
    exit_code: int = 0
    then: Callable[[], None] | None = None


@contextmanager
def result_stream(as_json: bool) -> Iterator[TextIO]:
    """Yield the stream for the result; with `as_json` nothing else reaches stdout, not even from child processes."""
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stream, redirect_stdout(sys.stderr):
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def print_outcome(outcome: Outcome, stream: TextIO, as_json: bool) -> None:
    if as_json:
        write_json(outcome.payload, stream)
    else:
        outcome.show(page(stream))
        stream.flush()


def write_json(payload: dict[str, Any], stream: TextIO) -> None:
    stream.write(json.dumps(_finite(payload), ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


# --- failures -----------------------------------------------------------------------------------------------


def fail(error: TunegateError, stream: TextIO, as_json: bool) -> int:
    """Print every problem; return the exit code."""
    show_problems(type(error).__name__, error.problems)
    if as_json:
        write_json(error_payload(type(error).__name__, error.problems, error.exit_code), stream)
    return error.exit_code


def fail_unexpectedly(error: Exception, args: list[str], stream: TextIO, as_json: bool) -> int:
    """A known cause as one of our errors. Else a bug or a broken library: one line, and the traceback in a file.

    TUNEGATE_DEBUG=1 prints every traceback on stderr instead.
    """
    known = explained(error, _store_root(args))
    what = without_secrets(f"{type(error).__name__}: {error}".strip().splitlines()[0])
    text = without_secrets("".join(traceback.format_exception(error)))
    debug = os.environ.get("TUNEGATE_DEBUG") == "1"
    if debug:
        sys.stderr.write(text)
    if known:
        return fail(known, stream, as_json)
    if debug:
        act = "the traceback is above"
    else:
        act = f"the traceback is in {_write_log(text, _store_root(args))}; TUNEGATE_DEBUG=1 prints it"
    problem = Problem(what, "unexpected", act=act)
    return fail(TunegateError(problem), stream, as_json)


def interrupted(stream: TextIO, as_json: bool) -> int:
    problem = Problem("stopped by you", act="the same command again resumes from there")
    show_problems("interrupted", [problem])
    if as_json:
        write_json(error_payload("Interrupted", [problem], INTERRUPTED), stream)
    return INTERRUPTED


@contextmanager
def stoppable(stream: TextIO, as_json: bool) -> Iterator[None]:
    """Ctrl-C ends this process and its children, a training worker with a checkpoint; a second one ends them at once.

    Raising KeyboardInterrupt is not enough: Prefect then reports to its own server, which the same Ctrl-C has
    stopped, and retries for minutes.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # started with nohup or in the background
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, stop_now)
        try:
            interrupted(stream, as_json)
            _stop_children()
        finally:
            os._exit(INTERRUPTED)

    def stop_now(number: int, frame: FrameType | None) -> None:
        try:
            _kill(_children())
        finally:
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop_children() -> None:
    import psutil

    from tasks.runtime.processes import SECONDS_TO_END, is_worker

    children = _children()
    workers = [child for child in children if is_worker(child)]
    _signal_all(children, signal.SIGTERM)
    if workers:
        text = f"a worker finishes its step, at most {SECONDS_TO_END:.0f} s; Ctrl-C again ends it at once\n"
        sys.stderr.write(text)
        psutil.wait_procs(workers, timeout=SECONDS_TO_END)
    _, left = psutil.wait_procs(children, timeout=_STOP_SECONDS)
    _kill(left)


def _children() -> list["Process"]:
    import psutil

    return psutil.Process().children(recursive=True)


def _kill(processes: list["Process"]) -> None:
    import psutil

    _signal_all(processes, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=_STOP_SECONDS)


def _signal_all(processes: list["Process"], number: signal.Signals) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _store_root(args: list[str]) -> Path:
    """Where a traceback goes: the store named on the command line, even if the rest of it was wrong."""
    from data_contracts.run_spec import StoreSpec

    named = [arg.partition("store.root=")[2] for arg in args if "store.root=" in arg]
    return Path(named[-1] if named else StoreSpec().root)


def _write_log(text: str, root: Path) -> Path:
    import tempfile

    name = f"error-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.txt"
    for folder in (root / "store" / "logs", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            return folder / name
        except OSError:
            continue  # the disk may be what failed
    return Path("no file could be written")


def show_problems(kind: str, problems: Sequence[Problem]) -> None:
    from rich.text import Text

    console = page(sys.stderr)
    for problem in problems:
        line = Text(f"{kind}: ", style="bold red")
        line.append(f"{problem.where}: {problem.what}" if problem.where else problem.what, style="default")
        console.print(line, soft_wrap=True)
        for label, text in (("limit", problem.limit), ("next", problem.act)):
            if text:
                console.print(Text.assemble(f"    {label}: ", text), soft_wrap=True, style="dim")


def error_payload(kind: str, problems: Sequence[Problem], exit_code: int) -> dict[str, Any]:
    listed = [{"what": p.what, "where": p.where, "limit": p.limit, "act": p.act} for p in problems]
    return {"error": {"kind": kind, "problems": listed}, "exit_code": exit_code}
