"""The one screen at the end of `tunegate run` and `tunegate gate`: the verdict, what decided it, three numbers, where to look.

At most 40 lines, and 80 columns wide except for paths and commands, which are never broken. `--details` adds the tables.
"""

import math
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.text import Text

from data_contracts.reports import RunReport, Stage
from data_contracts.verdict import Comparison, Decision, Estimate, GateReport, GateResult
from flows.cli.pages.tables import COLOURS, show_decision_tables, show_run_tables, show_stages, version_line
from tasks.reporting.finished_runs import html_file
from tasks.reporting.links import model_uri
from tasks.reporting.sentences import estimate, interval, label_of, number

if TYPE_CHECKING:
    from rich.console import Console

_MEANING = {"pass": "may be released", "fail": "must not be released", "inconclusive": "cannot be decided yet"}
_DEFAULT_ROOT = "mlruns"
_NONE = "-"
# A run with many tasks can have more gates than a screen has lines. A gate that did not pass takes up to four lines on 80
# columns: its numbers and its reason.
_MOST_PASSED, _MOST_OTHERS = 12, 4
_QUESTION_CHARS = 80
_REASON_CHARS = 200


def show_run(report: RunReport, console: "Console", *, details: bool = False, seconds: float | None = None) -> None:
    """One screen on a finished run; with `details` its tables below. seconds: how long the command took, if known."""
    model, found = report.model, report.comparison
    _show_headline(report.gate, f"{model.name} version {model.version}", console)
    about = [f"run {report.run_id}", report.base.name, f"{found.items:,} held-out items", _seeds(found.seeds)]
    _show_wrapped(", ".join(about), "  ", console)
    _show_deciding_gates(report.gate, console)
    _show_numbers(found, console)
    console.print()
    console.print(Text(version_line(model)))
    _show_time(report.stages, seconds, console)
    _show_next(_steps_after_run(report), console)
    if details:
        console.print()
        show_run_tables(report, console)


def show_decision(decision: Decision, root: str, console: "Console", *, details: bool = False) -> None:
    """One screen on a registered version that was judged alone; with `details` the tables below. root: of its store."""
    _show_headline(decision.gate, f"{decision.name} version {decision.version}", console)
    against = f"compared with {decision.champion}" if decision.champion else "no other version is in production"
    _show_wrapped(f"{against}, {decision.comparison.items:,} held-out items", "  ", console)
    _show_deciding_gates(decision.gate, console)
    _show_numbers(decision.comparison, console)
    steps = {"tables": "the same command with --details"}
    if decision.gate.verdict == "pass":
        steps["promote it"] = f"tunegate promote {decision.name} --version {decision.version}{_store_option(root)}"
    _show_next(steps, console)
    if details:
        show_decision_tables(decision.gate, decision.comparison, console)


def _show_headline(report: GateReport, model: str, console: "Console") -> None:
    """The verdict is the first word."""
    verdict = Text(report.verdict.upper(), style=f"bold {COLOURS[report.verdict]}")
    console.print(Text.assemble(verdict, f"  {model} {_MEANING[report.verdict]}"))


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


# --- what decided it ----------------------------------------------------------------------------------------


def deciding_gates(report: GateReport) -> list[GateResult]:
    """The gates with the verdict of the whole: all of a pass, those that failed, those that are inconclusive."""
    return [gate for gate in report.gates if gate.verdict == report.verdict]


def _show_deciding_gates(report: GateReport, console: "Console") -> None:
    console.print(Text(f"\nwhat decided it: {_counts(report)}", style="bold"))
    deciding = deciding_gates(report)
    shown = deciding[: _MOST_PASSED if report.verdict == "pass" else _MOST_OTHERS]
    for gate, line in zip(shown, _gate_lines(shown), strict=True):
        console.print(line, soft_wrap=True)
        if gate.verdict != "pass":  # of an inconclusive gate the reason ends with how many items or seeds decide it
            _show_wrapped(gate.why, "      ", console, style="")
    if len(deciding) > len(shown):
        console.print(Text(f"  and {len(deciding) - len(shown)} more, see the tables", style="dim"))
    undecided = [gate.name for gate in report.gates if gate.verdict == "inconclusive"]
    if report.verdict == "fail" and undecided:
        _show_wrapped(f"inconclusive: {', '.join(undecided)}", "  ", console)


def _counts(report: GateReport) -> str:
    """How many gates passed, failed, and are inconclusive."""
    if not report.gates:
        return "all gates are off: an unjudged version fails"
    total = len(report.gates)
    if report.verdict == "pass":
        return "the only gate passed" if total == 1 else f"all {total} gates passed"
    counts = {verdict: sum(gate.verdict == verdict for gate in report.gates) for verdict in COLOURS}
    words = {"fail": "failed", "inconclusive": "inconclusive", "pass": "passed"}
    return f"{', '.join(f'{counts[key]} {word}' for key, word in words.items() if counts[key])} of {_plural(total)}"


def _plural(gates: int) -> str:
    return "1 gate" if gates == 1 else f"{gates} gates"


def _gate_lines(gates: Sequence[GateResult]) -> Iterator[Text]:
    """A line a gate: verdict, name, number with its interval, limit."""
    cells = [(gate.name, _gate_number(gate), _gate_limit(gate)) for gate in gates]
    widths = [max((len(row[place]) for row in cells), default=0) for place in range(3)]
    for gate, row in zip(gates, cells, strict=True):
        padded = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield Text.assemble("  ", (gate.verdict, COLOURS[gate.verdict]), f"  {padded}".rstrip())


def _gate_number(gate: GateResult) -> str:
    if gate.actual is None or not math.isfinite(gate.actual):
        return _NONE
    return f"{number(gate.actual)} {interval(gate.interval)}".strip()


def _gate_limit(gate: GateResult) -> str:
    """A gate that a rule decides has no limit: the name of the rule begins its reason."""
    return f"{gate.direction} {number(gate.threshold)}" if gate.direction else gate.why.partition(":")[0]


def _show_wrapped(text: str, indent: str, console: "Console", style: str = "dim") -> None:
    """A text of at most three lines on 80 columns, shortened in its middle: its end says what would decide."""
    text = " ".join(text.split())
    if len(text) > _REASON_CHARS:
        text = f"{text[: _REASON_CHARS // 3]} ... {text[-(_REASON_CHARS * 2 // 3 - 5) :]}"
    for line in textwrap.wrap(text, max(40, console.width), initial_indent=indent, subsequent_indent=indent):
        console.print(Text(line, style=style), soft_wrap=True)


# --- three numbers ------------------------------------------------------------------------------------------


class _Number(NamedTuple):
    label: str
    value: str
    unit: str


def _show_numbers(found: Comparison, console: "Console") -> None:
    numbers = list(_numbers(found))
    label_width, value_width = (max(len(row[place]) for row in numbers) for place in range(2))
    console.print(Text("\nwhat was measured", style="bold"))
    for row in numbers:
        line = f"  {row.label:<{label_width}}  {row.value:<{value_width}}  "
        console.print(Text.assemble(line, (row.unit, "dim")), soft_wrap=True)


def _numbers(found: Comparison) -> Iterator[_Number]:
    """The candidate against LoRA; without a LoRA arm against the base and the champion. What is missing is a dash."""
    own = label_of(found.candidate)
    if not (found.retention or found.memory_saving or found.speed_ratio):
        yield _Number("loss below the base's", _measured(found.gain), "nats per token")
        yield _Number("loss below the champion's", _measured(found.champion_gain), "nats per token")
        yield _Number("answers with a stop token", _measured(found.stop_rate, ".1%"), "of the answers")
        return
    yield _Number("quality kept", _measured(found.retention, ".1%"), f"{own}'s share of LoRA's loss gain")
    yield _Number("memory saved", _measured(found.memory_saving, ".1%"), "of LoRA's peak in training")
    yield _Number("speed", _measured(found.speed_ratio, ".2f"), "x LoRA's speed in training")


def _measured(found: Estimate | None, form: str = ".3f") -> str:
    """A number with its interval; without one where both ends are the number: one seed has no spread."""
    if found is None or not math.isfinite(found.value):
        return f"{_NONE} not measured"
    if found.low == found.value == found.high:
        return f"{found.value:{form}} (one seed)"
    return estimate(found, form)


# --- how long, and where to look next -----------------------------------------------------------------------


def _show_time(stages: Sequence[Stage], seconds: float | None, console: "Console") -> None:
    """The command's time and the three longest stages; stages of one kind can run at the same time, so they do not add up."""
    ran = sorted((stage for stage in stages if stage.status == "ran"), key=lambda stage: -stage.seconds)[:3]
    if not ran:
        show_stages(stages, console)
        return
    longest = ", ".join(f"{stage.name} {duration(stage.seconds)}" for stage in ran)
    console.print(Text(f"took {duration(seconds)}; longest: {longest}" if seconds else f"longest stages: {longest}"))


def duration(seconds: float) -> str:
    """A person's way to write it: 8 s, 2 min 5 s, 3 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    large, small = (
        (f"{whole // 60} min", f"{whole % 60} s")
        if whole < 3600
        else (f"{whole // 3600} h", f"{whole % 3600 // 60} min")
    )
    return large if small.startswith("0 ") else f"{large} {small}"


def _store_option(root: str) -> str:
    return "" if root == _DEFAULT_ROOT else f" --set {shlex.quote(f'store.root={root}')}"


def _steps_after_run(report: RunReport) -> dict[str, str]:
    store = _store_option(report.spec["store"]["root"])
    questions = [answer.question for item in report.evaluations for answer in item.answers]
    text = " ".join(min(questions, key=len, default="your question").split()).replace('"', "'").replace("`", "")
    shown = text if len(text) <= _QUESTION_CHARS else f"{text[: _QUESTION_CHARS - 3]}..."
    return {
        "report": str(html_file(report)),
        "tables": f"tunegate compare{store}",
        "MLflow, Prefect": f"tunegate ui{store}",
        "ask it": f'tunegate predict "{shown}" --model {model_uri(report.model)}{store}',
    }


def _show_next(steps: dict[str, str], console: "Console") -> None:
    console.print(Text("\nwhere to look next", style="bold"))
    for label, text in steps.items():
        console.print(Text(f"  {label:<16} {text}"), soft_wrap=True)
