"""Lines for the person at the terminal, and side effects that never fail a run. Prefect and rich are imported where used:
`tunegate --help` waits for neither."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from logging import Logger, LoggerAdapter
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO

from data_contracts.errors import Problem

if TYPE_CHECKING:
    from rich.console import Console

Params = ParamSpec("Params")
Log = Logger | LoggerAdapter[Any]
_WIDTH_WITHOUT_TERMINAL = 130


def page(stream: TextIO) -> "Console":
    """A rich console that does not break lines at 80 columns when it writes to a file or a pipe."""
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, width=width, highlight=False)


def note(line: str) -> None:
    """A line on stderr, next to those of the stages."""
    page(sys.stderr).print(f"  {line}", style="dim", markup=False, soft_wrap=True)


def warn(problem: Problem, log: Log | None = None) -> None:
    """On stderr, and in the log: the run's, if there is one."""
    from prefect.context import FlowRunContext
    from prefect.logging import get_logger, get_run_logger

    page(sys.stderr).print(f"warning: {problem}", style="yellow", markup=False, soft_wrap=True)
    own = log or (get_run_logger() if FlowRunContext.get() else get_logger("tunegate"))
    own.warning("%s", problem)


def best_effort(what: str, act: str = "") -> Callable[[Callable[Params, None]], Callable[Params, None]]:
    """Make a function that never raises: a failure is a warning with `what` and the kind of error.

    Without the error's own text, which can hold the address of a webhook, and with it its secret.
    """

    def make(function: Callable[Params, None]) -> Callable[Params, None]:
        @wraps(function)
        def guarded(*args: Params.args, **kwargs: Params.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 whatever it is, the run is worth more
                warn(Problem(f"{what}: {type(error).__name__}", function.__name__, act=act))

        return guarded

    return make
