"""Pages for people: a run's models side by side, its data, what to do next. Text from data is never read as markup."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from data_contracts.reports import EvalReport, ModelVersion, RunReport, Stage, TrainReport
from flows.summary import html_file, model_uri, store_of
from flows.verdict_tables import show_comparison, show_gate
from tasks.sentences import label_of, number, started

if TYPE_CHECKING:
    from rich.console import Console

_NONE = "-"
_DEFAULT_ROOT = "mlruns"


def show_run(report: RunReport, console: "Console") -> None:
    """The whole story of a run, ending with what to do next."""
    show_stages(report.stages, console)
    show_models(report, console)
    show_comparison(report.comparison, console, report.base.note)
    show_gate(report.gate, console)
    show_version(report.model, console)
    _show_sample([scores[0] for scores, _ in models_of(report).values() if scores], console)
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


# --- models side by side ------------------------------------------------------------------------------------


def show_models(report: RunReport, console: "Console") -> None:
    """One column for each arm, base and champion; one line for each measure. Over several seeds it is the mean."""
    table = Table(title=f"run {report.run_id}: {report.base.name}", title_justify="left", title_style="bold")
    table.add_column("")
    models = models_of(report)
    for name in models:
        table.add_column(label_of(name), justify="right")
    for label, show in _SCORES:
        table.add_row(label, *(show(evals) for evals, _ in models.values()))
    if report.comparison.seed_sd:
        spread = report.comparison.seed_sd
        table.add_row("  sd over seeds", *(number(spread.get(name)) for name in models))
    table.add_row("rank by held-out loss", *_ranks(report, list(models)))
    table.add_section()
    for label, cost in _COSTS:
        table.add_row(label, *(cost(arms) if arms else _NONE for _, arms in models.values()))
    console.print(table)
    for arm in report.arms:
        if arm.start:
            console.print(Text(f"  {arm.name} {started(arm.start)}"), soft_wrap=True)


def models_of(report: RunReport) -> dict[str, tuple[list[EvalReport], list[TrainReport]]]:
    """base, arms and champion: for each its evaluations and trainings, one for each seed."""
    evals = {item.target: item for item in report.evaluations}
    found: dict[str, tuple[list[EvalReport], list[TrainReport]]] = {}
    if "base" in evals:
        found["base"] = ([evals["base"]], [])
    for arm in report.arms:
        scores, trained = found.setdefault(arm.arm, ([], []))
        scores += [evals[arm.name]] if arm.name in evals else []
        trained.append(arm)
    return found | ({"champion": ([evals["champion"]], [])} if "champion" in evals else {})


def _ranks(report: RunReport, names: list[str]) -> list[str]:
    losses = report.comparison.nll_nats
    order = sorted((name for name in names if name in losses), key=lambda name: losses[name])
    return [str(order.index(name) + 1) if name in order else _NONE for name in names]


def _mean(values: Sequence[float | None], form: str = ".3f") -> str:
    known = [value for value in values if value is not None]
    return number(fmean(known) if known else None, form)


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


_SCORES: list[tuple[str, Callable[[Sequence[EvalReport]], str]]] = [
    ("held-out loss, nats/token", lambda e: _mean([item.nll_nats for item in e])),
    ("  bits per byte", lambda e: _mean([item.bits_per_byte for item in e])),
    ("benchmark accuracy", lambda e: _mean([item.accuracy for item in e])),
    ("  word overlap alone", lambda e: _mean([item.lexical_baseline_accuracy for item in e])),
    ("answers: ROUGE-L", lambda e: _mean([score_of(item, "rouge_l") for item in e])),
    ("  ended by itself", lambda e: _mean([score_of(item, "stopped") for item in e])),
    ("ms per written token", lambda e: _mean([item.ms_per_token for item in e], ".0f")),
    ("held-out items", lambda e: str(e[0].items) if e else _NONE),
]
_COSTS: list[tuple[str, Callable[[Sequence[TrainReport]], str]]] = [
    ("seeds", lambda a: ", ".join(str(arm.seed) for arm in a)),
    ("rows too long", lambda a: f"{a[0].rows_too_long:,} {a[0].too_long}" if a[0].rows_too_long else "0"),
    ("trainable parameters", lambda a: f"{a[0].trainable_parameters:,}"),
    ("base weights", lambda a: size(a[0].weights_bytes)),
    ("peak memory in training", lambda a: size(fmean(arm.peak_train_bytes for arm in a))),
    ("  as planned", lambda a: size(a[0].predicted_train_bytes) if a[0].predicted_train_bytes else _NONE),
    ("tokens/s, with prompts", lambda a: f"{fmean(arm.useful_tokens_per_s for arm in a):,.0f}"),
    ("training minutes", lambda a: f"{fmean(arm.train_seconds for arm in a) / 60:.1f}"),
    ("precision and threads", lambda a: f"{a[0].precision}, {a[0].device}, {a[0].threads}"),
]


def score_of(report: EvalReport, metric: str) -> float | None:
    """A metric of domain_generate."""
    return next((s.value for s in report.scores if (s.task, s.metric) == ("domain_generate", metric)), None)


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
    told |= {label_of(target): answer.answer for target, answer in answers.items()}
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
