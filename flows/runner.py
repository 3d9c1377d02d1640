"""Runs the stages of a flow one after the other, prints how each ended and why it ran, and keeps that for the run's report.

Typed through Prefect's own `Task[P, R]`: a wrong argument of a stage is an error of mypy.
"""

import inspect
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Self, cast

from prefect import Flow, Task
from prefect.client.schemas.objects import State
from prefect.futures import wait
from prefect.logging import get_run_logger
from prefect.results import get_result_store
from prefect.states import Completed
from rich.text import Text

from data_contracts.errors import TunegateError
from data_contracts.reports import Stage
from data_contracts.retry_table import explained
from data_contracts.run_spec import RunSpec
from tasks.pipeline.cache_reasons import FORCED, Reasons
from tasks.pipeline.device_lock import device_slot
from tasks.pipeline.policies import POLICIES, P, R, stage_key
from tasks.runtime.console import page
from tasks.runtime.store import Store

StageStatus = Literal["ran", "cached", "skipped", "failed"]
_COLOURS: dict[StageStatus, str] = {"ran": "green", "cached": "cyan", "skipped": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Call(Generic[R]):
    """One run of a stage that is still to come, under the label that a person reads."""

    task: Task[..., R]
    label: str
    arguments: dict[str, Any]

    @staticmethod
    def of(label: str, task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> "Call[R]":
        """Raises TypeError, here and not in Prefect, if the arguments are not the task's."""
        return Call(task, label, dict(inspect.signature(task.fn).bind(*args, **kwargs).arguments))

    @property
    def stage(self) -> str:
        return str(self.task.name)

    @property
    def key(self) -> str:
        return stage_key(self.stage, self.arguments)


@dataclass
class Stages:
    """force: run every stage again, whatever the cache holds."""

    reasons: Reasons
    force: bool = False
    done: list[Stage] = field(default_factory=list)

    @classmethod
    def of(cls, spec: RunSpec, *, force: bool = False, flow: str = "retrain") -> Self:
        """flow: what its stages are compared with; the data stages of a retrain are the same alone."""
        return cls(Reasons(Store.of(spec.store), spec.model.name, flow), force)

    def run(self, task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one stage under its own name and return its result; what it raised is raised here."""
        (result,) = self.together([Call.of(str(task.name), task, *args, **kwargs)])
        return result

    def together(self, calls: Sequence[Call[R]]) -> list[R]:
        """Run calls of one stage at the same time; results in the order of the calls.

        What fails lets the others finish; then everything that went wrong is raised at once.
        """
        with self._device(calls):
            started = time.time()
            states = self._states(calls)
        results: list[R] = []
        errors: list[Exception] = []
        for call, state in zip(calls, states, strict=True):
            try:
                results.append(self._ended(call, state, started))
            except Exception as error:
                if len(calls) == 1:
                    raise
                errors.append(error)
        if errors:
            raise _as_one(errors)
        return results

    def skip(self, name: str, why: str) -> None:
        self._note(name, "skipped", 0.0, why)

    def end(self, result: R) -> R:
        """What the flow returns: its result, in a state named Skipped if no stage had anything to do."""
        if any(stage.status == "ran" for stage in self.done):
            return result
        return skipped(result, "nothing new: every stage was done before")

    def _states(self, calls: Sequence[Call[R]]) -> list[State[R]]:
        named = [call.task.with_options(refresh_cache=self.force, task_run_name=call.label) for call in calls]
        if len(calls) == 1:
            return [named[0](**calls[0].arguments, return_state=True)]
        futures = [own.submit(**call.arguments) for own, call in zip(named, calls, strict=True)]
        wait(futures)
        return [future.state for future in futures]

    def _ended(self, call: Call[R], state: State[R], started: float) -> R:
        """Print how a call ended, and why it ran; return its result, or raise what it raised. started: seconds since 1970."""
        seconds = max(0.0, state.timestamp.timestamp() - started)
        if state.is_failed() or state.is_crashed():
            _print("failed", call.label, seconds)
        result = _result(state, call.label)
        is_cached = state.name == "Cached"
        why = ""
        if not is_cached:
            why = FORCED if self.force else self.reasons.why(call.stage, call.label, call.arguments)
        self.reasons.keep(call.stage, call.label, call.arguments)
        self._note(call.label, "cached" if is_cached else "ran", seconds, why)
        return result

    def _device(self, calls: Sequence[Call[R]]) -> AbstractContextManager[None]:
        """One slot of the device for all of them, if this stage needs one and not all are cached. Taken out here, so that
        waiting costs a stage none of its time."""
        if not POLICIES[calls[0].stage].device:
            return nullcontext()
        store = get_result_store()
        cached = not self.force and all(store.exists(call.key) for call in calls)
        return nullcontext() if cached else device_slot(", ".join(call.label for call in calls))

    def _note(self, name: str, status: Literal["ran", "cached", "skipped"], seconds: float, why: str) -> None:
        self.done.append(Stage(name=name, status=status, seconds=round(seconds, 3), why=why))
        _print(status, name, seconds, why)


def _print(status: StageStatus, name: str, seconds: float, why: str = "") -> None:
    """One line on stderr, and one in the run's log."""
    line = Text.assemble((f"{status:>7}", _COLOURS[status]), f"  {name:<16} {seconds:7.1f} s  {why}".rstrip())
    page(sys.stderr).print(line, soft_wrap=True)
    get_run_logger().info("%s: %s%s", name, status, f", {why}" if why else "")


def _as_one(errors: list[Exception]) -> Exception:
    """One error with the problems of all, of the first one's kind."""
    own = [error for error in errors if isinstance(error, TunegateError)]
    if len(errors) == 1 or len(own) < len(errors):
        return errors[0] if len(errors) == 1 else ExceptionGroup(f"{len(errors)} arms failed", errors)
    return type(own[0])(*(problem for error in own for problem in error.problems))


def _result(state: State[R], name: str) -> R:
    try:
        return state.result()
    except Exception as error:
        known = explained(error) or error  # a stage out of time ends outside of its own function
        known.add_note(f"in stage {name}")
        if known is error:
            raise
        raise known from error


def skipped(result: R, why: str) -> R:
    """A flow's result in a state named Skipped. Prefect unwraps a state that a flow returns: the caller gets the result."""
    return cast(R, Completed(name="Skipped", message=why, data=result))


def in_store(flow: Flow[P, R], spec: RunSpec) -> Flow[P, R]:
    """The flow with its results kept in the spec's store."""
    # Paths are resolved: the flow's results must be found again from any working directory.
    results = Store.of(spec.store).files.resolve() / "results"
    results.mkdir(parents=True, exist_ok=True)
    return flow.with_options(result_storage=results)
