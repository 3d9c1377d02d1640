"""What a run says to the people who wait for it: one short plain text each, without secrets and without data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_contracts.errors import Problem, TunegateError
from data_contracts.releases import Move
from data_contracts.reports import ModelVersion, RunReport
from data_contracts.run_spec import RunSpec
from data_contracts.verdict import GateReport, GateResult
from tasks.reporting.markdown import interval, needs, number

_GATES_TOLD = 3
_PROBLEMS_TOLD = 3
_MOST_CHARACTERS = 300
# What decides where every gate passed: the others only say that the comparison is a fair one.
_TELLING = ("not_worse_than_champion", "candidate_beats_base", "qlora_keeps_loras_gain")
_SERVE = "`tunegate up` serves its page"


@dataclass(frozen=True)
class Message:
    subject: str
    body: str


def started(spec: RunSpec, run: str, reason: str, page: str | None) -> Message:
    """Why it runs, if somebody gave a reason, and what it trains."""
    arms = [*spec.train.methods, *(variant.name for variant in spec.train.variants)]
    seeds = f", {len(spec.train.seeds)} seeds" if len(spec.train.seeds) > 1 else ""
    lines = [f"reason: {_short(reason)}"] if reason else []
    lines.append(f"trains {', '.join(arms)} on {spec.model.base}{seeds}")
    return Message(f"{spec.model.name}: retrain started", _body(lines, run, page))


def verdict(
    report: RunReport, run: str, champion: str | None, html: Path, mlflow: str | None, page: str | None
) -> Message:
    """The verdict with the numbers that decide, who is champion now, and where to look."""
    gate, model = report.gate, report.model
    passed = sum(item.verdict == "pass" for item in gate.gates)
    lines = [f"{passed} of {len(gate.gates)} gates passed on {report.comparison.items} held-out items"]
    lines += [_gate(item) for item in deciding(gate)]
    now = f"version {champion}" if champion else "none yet"
    lines.append(f"champion now: {now}{', the new one' if champion == model.version else ''}")
    lines += [f"report: {html}", f"MLflow: {mlflow or f'run {report.recorded.mlflow_run_id}, {_SERVE}'}"]
    return Message(f"{model.name} version {model.version}: {gate.verdict.upper()}", _body(lines, run, page))


def deciding(gate: GateReport) -> list[GateResult]:
    """At most three: the gates that failed or could not be decided; where all passed, those that say most."""
    found = [item for item in gate.gates if item.verdict == gate.verdict]
    if gate.verdict == "pass":
        found = [item for name in _TELLING for item in found if item.name == name and item.actual is not None]
    return found[:_GATES_TOLD]


def failed(model: str, run: str, where: Sequence[str], error: BaseException | None, page: str | None) -> Message:
    """What broke, in which stage, and what to do next.

    An error that is not one of ours is told by its kind only: its text can hold anything.
    """
    problems = error.problems if isinstance(error, TunegateError) else [_unexpected(error)]
    lines = [*where, *(_problem(problem) for problem in problems[:_PROBLEMS_TOLD])]
    if more := len(problems) - _PROBLEMS_TOLD:
        lines += [f"and {more} more"] if more > 0 else []
    return Message(f"{model}: retrain FAILED", _body(lines, run, page))


def crashed(model: str, run: str, where: Sequence[str], page: str | None) -> Message:
    """The process is gone: nothing in it could say why."""
    lines = [*where, "the process that ran it was stopped or killed", "next: start it again; it goes on from there"]
    return Message(f"{model}: retrain CRASHED", _body(lines, run, page))


def moved(model: ModelVersion, move: Move) -> Message:
    """Another version is champion because somebody wanted it."""
    by = "override" if move.overrode else {"promote": "promotion", "rollback": "rollback"}[move.act]
    lines = [
        f"before: version {move.before}" if move.before else "before: none",
        *(f"overruled: {_short(told)}" for told in move.overrode),
        f"why: {_short(move.why)}",
        f"who: {move.who}",
    ]
    return Message(f"{model.name} version {model.version} is champion now, by {by}", "\n".join(lines))


def _gate(item: GateResult) -> str:
    spread = f" ({interval(item.interval)})" if item.interval else ""
    must = f", must be {needs(item)}" if item.direction else ""
    told = "" if item.verdict == "pass" else f": {item.verdict}"
    return f"- {item.name} {number(item.actual)}{spread}{must}{told}"


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
