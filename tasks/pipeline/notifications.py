"""Notify the blocks of `schedule.notify` that a retrain begins, how it ended, or that a champion was moved by hand.

What cannot be sent is reported on stderr and in the run's log after bounded retries; no notice ever fails a run. The text
of an error in sending is never shown: it can hold a webhook's address, which is its secret.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.blocks.notifications import AppriseNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.logging.loggers import flow_run_logger
from prefect.utilities.asyncutils import run_coro_as_sync

from data_contracts.errors import Problem, TunegateError
from data_contracts.releases import Move, Moved
from data_contracts.reports import ModelVersion, RunReport
from data_contracts.run_spec import ModelSpec, RunSpec, StoreSpec
from data_contracts.verdict import GateReport, GateResult
from tasks.release import registry
from tasks.reporting.links import mlflow_page, prefect_page
from tasks.reporting.markdown import needs, plain_interval, plain_number
from tasks.runtime.console import Log, best_effort, warn
from tasks.runtime.mlflow_client import connect
from tasks.runtime.store import Store

_TRIES, _FIRST_WAIT_SECONDS = 3, 1.0
_WHERE = "schedule.notify"
_PAGE = "docs/notifications.md"

# Runs in which no stage had anything to do so far, and the blocks that were there. Their start is sent when the first
# stage has: a run that finds all done before sends nothing.
_idle: dict[UUID, tuple[FlowRun, list[str]]] = {}


@dataclass(frozen=True)
class Notice:
    subject: str
    body: str


class AppriseUrl(AppriseNotificationBlock):
    """Whatever Apprise can reach, by its URL: mailtos://user:password@example.org?to=team@example.org is e-mail by SMTP."""

    _block_type_name = "Apprise URL"
    _block_type_slug = "apprise-url"


# --- hooks of a flow: plain functions, which Prefect also calls from the worker whose process was killed ----------------


@best_effort("the blocks were not checked")
def run_begins(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Report now, not after hours, if a block is not there."""
    there = [name for name in _names(flow_run) if _load(name, flow_run_logger(flow_run))]
    if there:
        _idle[flow_run.id] = (flow_run, there)


@best_effort("the start was not sent")
def work_begins() -> None:
    """Every stage calls it that has something to do: the first one's call sends the start of its run."""
    context = FlowRunContext.get()
    idle = _idle.pop(context.flow_run.id, None) if context and context.flow_run else None
    if idle:
        run, there = idle
        spec, reason = RunSpec.model_validate(run.parameters["spec"]), str(run.parameters.get("reason") or "")
        notice = started_notice(spec, run.name, reason, prefect_page(run.id))
        _send(there, notice, flow_run_logger(run))


@best_effort("the verdict was not sent")
def run_ends(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """The verdict; nothing where nothing was new."""
    _idle.pop(flow_run.id, None)
    names = _names(flow_run)
    if not names or state.name == "Skipped":
        return
    report: RunReport = state.result()
    store = StoreSpec.model_validate(report.spec["store"])
    champion = registry.alias_version(connect(store), report.model.name, registry.CHAMPION)
    html = (Store.of(store).files / report.html).resolve()
    pages = (mlflow_page(store, report.recorded.mlflow_run_id), prefect_page(flow_run.id))
    notice = verdict_notice(report, flow_run.name, champion, html, *pages)
    _send(names, notice, flow_run_logger(flow_run))


@best_effort("the failure was not sent")
def run_fails(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Which stage, what is wrong and what to do next; also where nothing was new."""
    _idle.pop(flow_run.id, None)
    names = _names(flow_run)
    if not names:
        return
    model = _spec(flow_run).get("model", {}).get("name", ModelSpec().name)
    page = prefect_page(flow_run.id)
    if state.is_crashed():
        notice = crashed_notice(model, flow_run.name, _unfinished(flow_run), page)
    else:
        error = state.result(raise_on_failure=False)
        notice = failed_notice(model, flow_run.name, getattr(error, "__notes__", []), error, page)
    _send(names, notice, flow_run_logger(flow_run))


def _unfinished(flow_run: FlowRun) -> list[str]:
    """The stages that a killed process left."""
    with get_client(sync_client=True) as client:
        own = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        runs = client.read_task_runs(flow_run_filter=own)
    return [f"in stage {run.name}" for run in runs if run.state and not run.state.is_completed()]


def _names(flow_run: FlowRun) -> list[str]:
    return list(_spec(flow_run).get("schedule", {}).get("notify", []))


def _spec(flow_run: FlowRun) -> dict[str, Any]:
    """As it was given: a spec that is wrong fails its run, and that must be sent too."""
    return dict(flow_run.parameters.get("spec") or {})


# --- by hand ------------------------------------------------------------------------------------------------


@best_effort("the move was not sent")
def champion_moved(store: StoreSpec, found: Moved) -> None:
    """Notify the blocks that the newest run of this model names."""
    spec = Store.of(store).newest_spec(found.model.name) or {}
    if found.move:
        _send(spec.get("schedule", {}).get("notify", []), moved_notice(found.model, found.move))


# --- sending ------------------------------------------------------------------------------------------------


def _send(names: Sequence[str], notice: Notice, log: Log | None = None) -> None:
    for name in names:
        block = _load(name, log)
        if block:
            _deliver(name, block, notice, log)


def _load(name: str, log: Log | None) -> NotificationBlock | None:
    try:
        block = Block.load(name)
    except Exception as error:  # noqa: BLE001 a block's own class may raise anything
        missing = isinstance(error.__cause__, ObjectNotFound)
        what = f"no block {name}" if missing else f"{name} cannot be loaded: {type(error).__name__}"
        warn(Problem(what, _WHERE, act=f"create it: {_PAGE} shows how"), log)
        return None
    if isinstance(block, NotificationBlock):
        return block
    warn(Problem(f"{name} cannot notify", _WHERE, "a notification block", f"{_PAGE} lists them"), log)
    return None


def _deliver(name: str, block: NotificationBlock, notice: Notice, log: Log | None) -> None:
    for attempt in range(1, _TRIES + 1):
        try:
            with block.raise_on_failure():
                sent = block.notify(notice.body, notice.subject)
                if isawaitable(sent):  # the interface is async, though all of Prefect's own blocks send at once here
                    run_coro_as_sync(sent)
            return
        except Exception as error:  # noqa: BLE001 a block's own class may raise anything
            if attempt == _TRIES:
                what = f"{name} was not sent {notice.subject!r}: {_reason(error)}"
                warn(Problem(what, _WHERE, f"{_TRIES} tries", f"look at the block and its server ({_PAGE})"), log)
            else:
                time.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1))


def _reason(error: Exception) -> str:
    """The kind of failure, and the status that a server answered with."""
    status = getattr(getattr(error, "response", None), "status_code", "")
    return f"{type(error).__name__} {status}".strip()


_MOST_GATES = 3
_MOST_PROBLEMS = 3
_MOST_CHARACTERS = 300
# What decides where every gate passed: the others only say that the comparison is a fair one.
_DECISIVE = ("not_worse_than_champion", "candidate_beats_base", "qlora_keeps_loras_gain")
_SERVE = "`tunegate up` serves its page"


def started_notice(spec: RunSpec, run: str, reason: str, page: str | None) -> Notice:
    """Why it runs, if somebody gave a reason, and what it trains."""
    arms = [*spec.train.methods, *(variant.name for variant in spec.train.variants)]
    seeds = f", {len(spec.train.seeds)} seeds" if len(spec.train.seeds) > 1 else ""
    lines = [f"reason: {_short(reason)}"] if reason else []
    lines.append(f"trains {', '.join(arms)} on {spec.model.base}{seeds}")
    return Notice(f"{spec.model.name}: retrain started", _body(lines, run, page))


def verdict_notice(
    report: RunReport, run: str, champion: str | None, html: Path, mlflow: str | None, page: str | None
) -> Notice:
    """The verdict with the numbers that decide, who is champion now, and where to look."""
    gate, model = report.gate, report.model
    passed = sum(item.verdict == "pass" for item in gate.gates)
    lines = [f"{passed} of {len(gate.gates)} gates passed on {report.comparison.items} held-out items"]
    lines += [_gate(item) for item in deciding(gate)]
    now = f"version {champion}" if champion else "none yet"
    lines.append(f"champion now: {now}{', the new one' if champion == model.version else ''}")
    lines += [f"report: {html}", f"MLflow: {mlflow or f'run {report.recorded.mlflow_run_id}, {_SERVE}'}"]
    return Notice(f"{model.name} version {model.version}: {gate.verdict.upper()}", _body(lines, run, page))


def deciding(gate: GateReport) -> list[GateResult]:
    """At most three: the gates that failed or could not be decided; where all passed, those that decide most."""
    found = [item for item in gate.gates if item.verdict == gate.verdict]
    if gate.verdict == "pass":
        found = [item for name in _DECISIVE for item in found if item.name == name and item.actual is not None]
    return found[:_MOST_GATES]


def failed_notice(model: str, run: str, where: Sequence[str], error: BaseException | None, page: str | None) -> Notice:
    """What broke, in which stage, and what to do next.

    Of an error that is not one of ours only the kind is sent: its text can hold anything.
    """
    problems = error.problems if isinstance(error, TunegateError) else [_unexpected(error)]
    lines = [*where, *(_problem(problem) for problem in problems[:_MOST_PROBLEMS])]
    if more := len(problems) - _MOST_PROBLEMS:
        lines += [f"and {more} more"] if more > 0 else []
    return Notice(f"{model}: retrain FAILED", _body(lines, run, page))


def crashed_notice(model: str, run: str, where: Sequence[str], page: str | None) -> Notice:
    """The process is gone: nothing in it could say why."""
    lines = [*where, "the process that ran it was stopped or killed", "next: start it again; it resumes from there"]
    return Notice(f"{model}: retrain CRASHED", _body(lines, run, page))


def moved_notice(model: ModelVersion, move: Move) -> Notice:
    """Another version is champion because somebody wanted it."""
    by = "override" if move.overrode else {"promote": "promotion", "rollback": "rollback"}[move.act]
    lines = [
        f"before: version {move.before}" if move.before else "before: none",
        *(f"overruled: {_short(line)}" for line in move.overrode),
        f"why: {_short(move.why)}",
        f"who: {move.who}",
    ]
    return Notice(f"{model.name} version {model.version} is champion now, by {by}", "\n".join(lines))


def _gate(item: GateResult) -> str:
    spread = f" ({plain_interval(item.interval)})" if item.interval else ""
    must = f", must be {needs(item)}" if item.direction else ""
    verdict = "" if item.verdict == "pass" else f": {item.verdict}"
    return f"- {item.name} {plain_number(item.actual)}{spread}{must}{verdict}"


def _problem(problem: Problem) -> str:
    """Its first line: a worker's has the end of its log below."""
    what = problem.what.splitlines()[0] if problem.what else ""
    parts = [f"{problem.where}: {what}" if problem.where else what]
    parts += [f"limit: {problem.limit}"] if problem.limit else []
    parts += [f"next: {problem.act}"] if problem.act else []
    return "- " + "; ".join(_short(part) for part in parts)


def _unexpected(error: BaseException | None) -> Problem:
    return Problem(type(error).__name__ if error else "no error is known", act="read the run's log")


def _body(lines: Sequence[str], run: str, page: str | None) -> str:
    return "\n".join([*lines, f"Prefect: {page or f'run {run}, {_SERVE}'}"])


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS - 3]}..."
