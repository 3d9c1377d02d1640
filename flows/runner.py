"""Run the stages of a flow one after the other, tell each one's end and why it ran, and remember how it went."""

import inspect
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from prefect.client.schemas.objects import State
from prefect.futures import wait
from prefect.logging import get_run_logger
from prefect.results import get_result_store
from prefect.states import Completed
from rich.text import Text

from data_contracts.errors import TunegateError
from data_contracts.failures import explained
from data_contracts.reports import Stage
from data_contracts.run_spec import RunSpec
from tasks.pipeline.cache_reasons import FORCED, Reasons
from tasks.pipeline.device_lock import device_slot
from tasks.pipeline.policies import POLICIES, stage_key
from tasks.runtime.console import page
from tasks.runtime.store import Store

_COLOURS = {"ran": "green", "cached": "cyan", "skipped": "yellow", "failed": "red"}


@dataclass
class Stages:
    """force: run every stage again, whatever the cache holds."""

    reasons: Reasons
    force: bool = False
    done: list[Stage] = field(default_factory=list)

    @classmethod
    def of(cls, spec: RunSpec, force: bool = False, flow: str = "retrain") -> "Stages":
        """flow: what its stages are compared with; the data stages of a retrain are the same alone."""
        return cls(Reasons(Store.of(spec.store), spec.model.name, flow), force)

    def run(self, task: Any, *args: Any, label: str | None = None) -> Any:
        """Run one Prefect task and return its result; what it raised is raised here."""
        (result,) = self.together(task, [(label or task.name, args)])
        return result

    def together(self, task: Any, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[Any]:
        """Run a task with several inputs at the same time, each under its label; results in the order of the calls.

        What fails lets the others finish; then everything that went wrong is raised at once.
        """
        named = [(name, inspect.signature(task.fn).bind(*args).arguments) for name, args in calls]
        with self._device(task.name, named):
            started = time.time()
            states = self._states(task, calls)
        results: list[Any] = []
        errors: list[Exception] = []
        for (name, arguments), state in zip(named, states, strict=True):
            try:
                results.append(self._ended(task.name, name, arguments, state, started))
            except Exception as error:
                if len(calls) == 1:
                    raise
                errors.append(error)
        if errors:
            raise _as_one(errors)
        return results

    def skip(self, name: str, why: str) -> None:
        self._note(name, "skipped", 0.0, why)

    def end(self, result: Any) -> Any:
        """What the flow returns: its result, in a state named Skipped if no stage had anything to do."""
        if any(stage.status == "ran" for stage in self.done):
            return result
        return Completed(name="Skipped", message="nothing new: every stage was done before", data=result)

    def _states(self, task: Any, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[State[Any]]:
        named = [(task.with_options(refresh_cache=self.force, task_run_name=name), args) for name, args in calls]
        if len(named) == 1:
            ((own, args),) = named
            return [own(*args, return_state=True)]
        futures = [own.submit(*args) for own, args in named]
        wait(futures)
        return [future.state for future in futures]

    def _ended(self, stage: str, name: str, arguments: dict[str, Any], state: State[Any], started: float) -> Any:
        """Tell how a task ended, and why it ran; return its result, or raise what it raised. started: seconds since 1970."""
        seconds = max(0.0, state.timestamp.timestamp() - started)
        if state.is_failed() or state.is_crashed():
            self._tell("failed", name, seconds)
        result = _result(state, name)
        status = "cached" if state.name == "Cached" else "ran"
        why = "" if status == "cached" else FORCED if self.force else self.reasons.why(stage, name, arguments)
        self.reasons.keep(stage, name, arguments)
        self._note(name, status, seconds, why)
        return result

    def _device(self, stage: str, named: Sequence[tuple[str, dict[str, Any]]]) -> AbstractContextManager[None]:
        """One slot of the device for all of them, if this stage needs one and not all are cached. Taken out here, so that
        waiting costs a stage none of its time."""
        if not POLICIES[stage].device:
            return nullcontext()
        store, asked = get_result_store(), [name for name, _ in named]
        cached = not self.force and all(store.exists(stage_key(stage, arguments)) for _, arguments in named)
        return nullcontext() if cached else device_slot(", ".join(asked))

    def _note(self, name: str, status: Any, seconds: float, why: str = "") -> None:
        self.done.append(Stage(name=name, status=status, seconds=round(seconds, 3), why=why))
        self._tell(status, name, seconds, why)

    def _tell(self, status: str, name: str, seconds: float, why: str = "") -> None:
        colour = _COLOURS[status]
        console = page(sys.stderr)
        line = Text.assemble((f"{status:>7}", colour), f"  {name:<16} {seconds:7.1f} s  {why}".rstrip())
        console.print(line, soft_wrap=True)
        get_run_logger().info("%s: %s%s", name, status, f", {why}" if why else "")


def _as_one(errors: list[Exception]) -> Exception:
    """One error with the problems of all, of the first one's kind."""
    own = [error for error in errors if isinstance(error, TunegateError)]
    if len(errors) == 1 or len(own) < len(errors):
        return errors[0] if len(errors) == 1 else ExceptionGroup(f"{len(errors)} arms failed", errors)
    return type(own[0])(*(problem for error in own for problem in error.problems))


def _result(state: Any, name: str) -> Any:
    try:
        return state.result()
    except Exception as error:
        known = explained(error) or error  # a stage out of time ends outside of its own function
        known.add_note(f"in stage {name}")
        if known is error:
            raise
        raise known from error


def in_store(flow_: Any, spec: RunSpec) -> Any:
    # Paths are resolved: the flow's results must be found again from any working directory.
    results = Store.of(spec.store).files.resolve() / "results"
    results.mkdir(parents=True, exist_ok=True)
    return flow_.with_options(result_storage=results)
