"""A run's models side by side: one column for each arm, base and champion, one line for each measure. Over several seeds
it is the mean."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from data_contracts.reports import EvalReport, TrainReport
from data_contracts.verdict import Comparison
from tasks.reporting.sentences import number

_NONE = "-"
TableRow = tuple[str, list[str]]
Models = dict[str, tuple[list[EvalReport], list[TrainReport]]]


def models_by_name(arms: Sequence[TrainReport], evaluations: Sequence[EvalReport]) -> Models:
    """base, arms and champion: for each its evaluations and trainings, one for each seed."""
    evals = {item.target: item for item in evaluations}
    found: Models = {}
    if "base" in evals:
        found["base"] = ([evals["base"]], [])
    for arm in arms:
        scores, trained = found.setdefault(arm.arm, ([], []))
        scores += [evals[arm.name]] if arm.name in evals else []
        trained.append(arm)
    if "candidate" in evals:  # a registered version, judged without the other arms of its run
        found["candidate"] = ([evals["candidate"]], [])
    return found | ({"champion": ([evals["champion"]], [])} if "champion" in evals else {})


def score_rows(models: Models, comparison: Comparison) -> list[TableRow]:
    """What each model scored, and its rank."""
    rows = [(label, [show(evals) for evals, _ in models.values()]) for label, show in _SCORES]
    if spread := comparison.seed_sd:
        rows.append(("  sd over seeds", [number(spread.get(name)) for name in models]))
    return [*rows, ("rank by held-out loss", _ranks(comparison, list(models)))]


def cost_rows(models: Models) -> list[TableRow]:
    """What each arm took to train; nothing where none was trained."""
    if not any(arms for _, arms in models.values()):
        return []
    return [(label, [cost(arms) if arms else _NONE for _, arms in models.values()]) for label, cost in _COSTS]


def _ranks(comparison: Comparison, names: list[str]) -> list[str]:
    losses = comparison.nll_nats
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
    ("  ended with a stop token", lambda e: _mean([score_of(item, "stopped") for item in e])),
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


PARTS = {
    "process": "libraries",
    "weights": "the base's weights",
    "adapters": "adapters",
    "optimiser": "optimiser states",
    "gradients": "gradients then alive",
    "activations": "activations",
    "logits": "logits",
    "rest": "activations, logits, gradients, kernels together",
}
"""What the parts of a training's memory are called, in the order of a bar."""


class Choice(NamedTuple):
    what: str
    chosen: str
    why: str


def choices(arm: TrainReport) -> list[Choice]:
    """Every choice that was made at run time."""
    return [
        Choice("device", arm.device, arm.device_reason),
        Choice("precision", arm.precision, arm.precision_reason),
        Choice("attention", f"{arm.scoring} forward", arm.scoring_reason),
        Choice("batch", arm.batch, arm.batch_reason),
        Choice("threads", str(arm.threads), arm.threads_reason),
    ]


def memory_parts(arm: TrainReport) -> dict[str, dict[str, int]]:
    """Bytes of each part of the peak, as measured and as planned. Where parts were not measured: the weights and all else."""
    found = arm.measured_memory.model_dump() if arm.measured_memory else _weights_and_rest(arm)
    return {"measured": found} | ({"planned": arm.planned_memory.model_dump()} if arm.planned_memory else {})


def _weights_and_rest(arm: TrainReport) -> dict[str, int]:
    return {"weights": arm.weights_bytes, "rest": arm.peak_train_bytes - arm.weights_bytes}
