"""Run the stages of a flow one after the other, tell each one's end, and remember how it went."""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from prefect.states import Completed

from data_contracts.reports import Stage
from flows.console import page

_COLOURS = {"ran": "green", "cached": "cyan", "skipped": "yellow", "failed": "red"}


@dataclass
class Stages:
    """force: run every stage again, whatever the cache holds."""

    force: bool = False
    done: list[Stage] = field(default_factory=list)

    def run(self, task: Any, *args: Any, label: str | None = None) -> Any:
        """Run one Prefect task and return its result; what it raised is raised here."""
        started = time.monotonic()
        name = label or task.name
        state = task.with_options(refresh_cache=self.force, task_run_name=name)(*args, return_state=True)
        if state.is_failed() or state.is_crashed():
            self._tell("failed", name, time.monotonic() - started)
        result = state.result()
        self._note(name, "cached" if state.name == "Cached" else "ran", time.monotonic() - started)
        return result

    def skip(self, name: str, why: str) -> None:
        self._note(name, "skipped", 0.0, why)

    def end(self, result: Any) -> Any:
        """What the flow returns: its result, in a state named Skipped if no stage had anything to do."""
        if any(stage.status == "ran" for stage in self.done):
            return result
        return Completed(name="Skipped", message="nothing new: every stage was done before", data=result)

    def _note(self, name: str, status: Any, seconds: float, why: str = "") -> None:
        self.done.append(Stage(name=name, status=status, seconds=round(seconds, 3)))
        self._tell(status, name, seconds, why)

    def _tell(self, status: str, name: str, seconds: float, why: str = "") -> None:
        colour = _COLOURS[status]
        line = f"[{colour}]{status:>7}[/{colour}]  {name:<16} {seconds:7.1f} s  {why}"
        page(sys.stderr).print(line.rstrip())
