"""What a run does beside its work, such as messages and artifacts: if it fails that is told, and the run goes on."""

from collections.abc import Callable
from functools import wraps
from logging import Logger, LoggerAdapter
from typing import Any, ParamSpec

from prefect.context import FlowRunContext
from prefect.logging import get_logger, get_run_logger
from rich.console import Console
from rich.text import Text

from data_contracts.errors import Problem

P = ParamSpec("P")
Log = Logger | LoggerAdapter[Any]


def aside(what: str, act: str = "") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function that never raises: what went wrong is told as `what` and the kind of error.

    Not with the error's own text, which can hold the address of a webhook, and with it its secret.
    """

    def make(function: Callable[P, None]) -> Callable[P, None]:
        @wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 whatever it is, the run is worth more
                warn(Problem(f"{what}: {type(error).__name__}", function.__name__, act=act))

        return guarded

    return make


def tell(line: str) -> None:
    """A line for the person at the terminal, beside the stages'."""
    Console(stderr=True).print(f"  {line}", style="dim", markup=False, soft_wrap=True)


def warn(problem: Problem, log: Log | None = None) -> None:
    """On stderr, and in the log: the run's, if there is one."""
    Console(stderr=True).print(Text(f"warning: {problem}"), style="yellow", soft_wrap=True)
    own = log or (get_run_logger() if FlowRunContext.get() else get_logger("tunegate"))
    own.warning("%s", problem)
