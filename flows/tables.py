"""Pages for people: a run's models side by side, its gates, its data. Text from data is never read as markup."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from data_contracts.reports import (
    Comparison,
    EvalReport,
    GateReport,
    Interval,
    ModelVersion,
    RunReport,
    Stage,
    TrainReport,
)
from flows.summary import html_file, model_uri, store_of

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
_LABELS = {"base": "base", "lora": "LoRA", "qlora": "QLoRA", "full": "full", "prefix": "prefix", "champion": "champion"}
_NONE = "-"
_DEFAULT_ROOT = "mlruns"


def show_run(report: RunReport, console: "Console") -> None:
    """The whole story of a run, ending with what to do next."""
    show_stages(report.stages, console)
    show_models(report, console)
    show_comparison(report.comparison, console, report.base.note)
    show_gate(report.gate, console)
    show_version(report.model, console)
    _show_sample(report.evaluations, console)
    _show_next(report, console)


def show_stages(stages: Sequence[Stage], console: "Console") -> None:
    """Each stage was told when it ended; all that is left to say is that none had anything to do."""
    if stages and all(stage.status != "ran" for stage in stages):
        console.print("nothing to do: every stage was done before with the same input (--force runs it all again)")


def show_verdict(report: RunReport, console: "Console") -> None:
    """A finished run's table and verdict, without its stages and next steps."""
    show_models(report, console)
    show_comparison(report.comparison, console, report.base.note)
    show_gate(report.gate, console)
    show_version(report.model, console)


def show_decision(report: GateReport, comparison: Comparison | None, console: "Console") -> None:
    if comparison:
        show_comparison(comparison, console)
    show_gate(report, console)


# --- models side by side ------------------------------------------------------------------------------------


def show_models(report: RunReport, console: "Console") -> None:
    """One column for each model, one line for each measure."""
    evals = {item.target: item for item in report.evaluations}
    arms = {arm.method: arm for arm in report.arms}
    targets = [target for target in _LABELS if target in evals or target in arms]
    table = Table(title=f"run {report.run_id}: {report.base.name}", title_justify="left", title_style="bold")
    table.add_column("")
    for target in targets:
        table.add_column(_LABELS[target], justify="right")
    for label, show in _SCORES:
        table.add_row(label, *(show(evals[target]) if target in evals else _NONE for target in targets))
    table.add_section()
    for label, cost in _COSTS:
        table.add_row(label, *(cost(arms[target]) if target in arms else _NONE for target in targets))
    console.print(table)


def _number(value: float | None, form: str = ".3f") -> str:
    return _NONE if value is None else format(value, form)


def _interval(interval: Interval | None, form: str = ".3f") -> str:
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _peak(arm: TrainReport) -> str:
    planned = arm.predicted_train_bytes
    return _size(arm.peak_train_bytes) + ("" if planned is None else f" (planned {_size(planned)})")


_SCORES: list[tuple[str, Callable[[EvalReport], str]]] = [
    ("held-out loss, nats/token", lambda e: _number(e.nll_nats)),
    ("held-out perplexity", lambda e: _number(e.perplexity, ".1f")),
    ("benchmark accuracy", lambda e: _number(e.accuracy) + _interval(e.accuracy_interval)),
    ("  word overlap alone", lambda e: _number(e.lexical_baseline_accuracy)),
    ("held-out items", lambda e: str(e.items)),
]
_COSTS: list[tuple[str, Callable[[TrainReport], str]]] = [
    ("training rows too long", lambda a: f"{a.rows_too_long:,} {a.too_long}" if a.rows_too_long else "0"),
    ("trainable parameters", lambda a: f"{a.trainable_parameters:,}"),
    ("base weights in memory", lambda a: _size(a.weights_bytes)),
    ("peak memory while training", _peak),
    ("tokens/s, prompts included", lambda a: f"{a.useful_tokens_per_s:,.0f}"),
    ("training minutes", lambda a: f"{a.train_seconds / 60:.1f}"),
    ("precision, device, threads", lambda a: f"{a.precision}, {a.device}, {a.threads}"),
]


# --- verdict ------------------------------------------------------------------------------------------------


def show_comparison(found: Comparison, console: "Console", note: str = "") -> None:
    """QLoRA against LoRA in sentences."""
    lines: list[tuple[float | None, Callable[[float], str]]] = [
        (found.retention, lambda v: f"QLoRA keeps {v:.1%}{_interval(found.retention_ci95, '.1%')} of LoRA's loss gain"),
        (
            found.accuracy_drop,
            lambda v: f"accuracy lost to LoRA: {v:+.3f}{_interval(found.accuracy_drop_ci95, '+.3f')}",
        ),
        (found.weights_saving, lambda v: f"memory of the base weights saved: {v:.1%}"),
        (found.memory_saving, lambda v: f"peak memory saved: {v:.1%}"),
        (found.speed_ratio, lambda v: f"QLoRA trains at {v:.2f} x LoRA's speed"),
    ]
    console.print(Text(f"\nthe same {found.items} held-out items for every model, paired", style="bold"))
    for target, interval in found.nll_gain_ci95.items():
        console.print(Text(f"  {_gain(found, target)}{_interval(interval)} nats/token"), soft_wrap=True)
    for target, interval in found.accuracy_gain_ci95.items():
        gain = found.accuracy[target] - found.accuracy["base"]
        line = (
            f"  {_LABELS.get(target, target)} changes accuracy against base by {gain:+.3f}{_interval(interval, '+.3f')}"
        )
        console.print(Text(line), soft_wrap=True)
    for value, sentence in lines:
        if value is not None:
            console.print(Text(f"  {sentence(value)}"), soft_wrap=True)
    for claim in found.claims:
        console.print(Text(f"  {claim}"), soft_wrap=True)
    if note:
        console.print(Text(f"  base: {note}", style="dim"), soft_wrap=True)


def _gain(found: Comparison, target: str) -> str:
    """How much lower the held-out loss is: of an arm against the base, of the candidate against the champion."""
    rival, better = ("champion", found.candidate) if target == "champion" else ("base", target)
    gain = found.nll_nats[rival] - found.nll_nats[better]
    return f"{_LABELS.get(better, better)} lowers held-out loss against {_LABELS[rival]} by {gain:.3f}"


def show_gate(report: GateReport, console: "Console") -> None:
    table = Table(title="\ngates", title_justify="left", title_style="bold")
    for name in ("gate", "threshold", "actual", "interval", "verdict", "why"):
        table.add_column(name, justify="right" if name in ("threshold", "actual", "interval") else "left")
    for item in report.gates:
        verdict = Text(item.verdict, style=_COLOURS[item.verdict])
        numbers = [_number(item.threshold), _number(item.actual), _interval(item.interval).strip() or _NONE]
        table.add_row(item.name, *numbers, verdict, Text(item.why))
    console.print(table)
    console.print(Text.assemble("verdict: ", (report.verdict.upper(), f"bold {_COLOURS[report.verdict]}")))


def show_version(model: ModelVersion, console: "Console") -> None:
    aliases = ", ".join(model.aliases) or "no alias"
    console.print(Text(f"registered: {model.name} version {model.version} ({aliases})"), soft_wrap=True)


def _show_sample(evaluations: Sequence[EvalReport], console: "Console") -> None:
    """One question, answered by the base and by each tuned model."""
    answers = {item.target: item.answers[0] for item in evaluations if item.answers}
    if not answers:
        return
    first = next(iter(answers.values()))
    console.print(Text("\na held-out question, and who answers what", style="bold"))
    told = {"question": first.question, "reference": first.reference}
    told |= {_LABELS.get(target, target): answer.answer for target, answer in answers.items()}
    for label, text in told.items():
        console.print(Text(f"  {label:<10} {_one_line(text)}"), soft_wrap=True)


def _one_line(text: str, limit: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _show_next(report: RunReport, console: "Console") -> None:
    root = report.spec["store"]["root"]
    store = "" if root == _DEFAULT_ROOT else f" --set store.root={root}"
    question = next((item.answers[0].question for item in report.evaluations if item.answers), "your question")
    asked = _one_line(question, 80).replace('"', "'").replace("`", "")
    steps = {
        "report": str(html_file(report)),
        "data": str(store_of(report).files / report.dataset.data_docs),
        "MLflow, Prefect": f"tunegate ui{store}",
        "ask it": f'tunegate predict "{asked}" --model {model_uri(report.model)}{store}',
    }
    console.print(Text("\nwhere to look next", style="bold"))
    for label, text in steps.items():
        console.print(Text(f"  {label:<16} {text}"), soft_wrap=True)
