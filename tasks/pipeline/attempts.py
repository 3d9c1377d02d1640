"""One try of a stage: what fails becomes one of our errors with the next act, and says how often it was tried."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from prefect.context import TaskRunContext

from data_contracts.errors import TunegateError
from data_contracts.failures import explained, has_secret, may_pass
from data_contracts.run_spec import RunSpec, StoreSpec
from tasks.runtime.console import tell
from tasks.runtime.store import Store


def explaining(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with errors that a person can act on. What is not known to the table is a bug and stays as it is."""

    @wraps(function)
    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            found = explained(error, _place([*args, *kwargs.values()]))
            if found is None:
                raise
            told = _counted(found)
            if told is error:
                raise
            raise told from (None if has_secret(error) else error)

    return attempt


def _counted(error: TunegateError) -> TunegateError:
    """Say that it will be tried again; after the last try the error says how many there were."""
    context = TaskRunContext.get()
    if context is None or not may_pass(error):
        return error
    tries, most = context.task_run.run_count, 1 + context.task.retries
    if tries >= most:
        problems = (replace(problem, what=f"{problem.what} (tried {tries} times)") for problem in error.problems)
        return type(error)(*problems)
    what = "; ".join(problem.what for problem in error.problems)
    tell(f"{context.task_run.name}: {what}; that was try {tries} of {most}")
    return error


def _place(arguments: Iterable[Any]) -> Path | None:
    """Where the stage's store lies, whatever it was told of it."""
    for argument in arguments:
        if isinstance(argument, Store):
            return argument.root
        if isinstance(argument, RunSpec | StoreSpec):
            return Path((argument.store if isinstance(argument, RunSpec) else argument).root)
    return None
