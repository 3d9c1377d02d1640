"""QLoRA against LoRA, base and champion: differences paired by item, each with its interval."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from data_contracts.errors import DataError, Problem
from data_contracts.reports import Comparison, Interval, TrainReport
from tasks.core.stats import Floats, bootstrap, gain_interval, per_token, retention, retention_interval


@dataclass(frozen=True)
class Samples:
    """One metric of one task, per item: I row ids, values and completion tokens."""

    row_ids: list[str]
    values_I: Floats
    tokens_I: Floats


def read_samples(lines: Iterable[str]) -> dict[str, Samples]:
    """Per-item values by task, from the lines of a samples file, each a JSON object."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    for line in lines:
        sample = json.loads(line)
        found.setdefault(sample["task"], []).append((sample["row_id"], sample["value"], sample["tokens"] or 1.0))
    return {
        task: Samples([r for r, _, _ in rows], np.array([v for _, v, _ in rows]), np.array([t for _, _, t in rows]))
        for task, rows in found.items()
    }


Scored = Mapping[str, Mapping[str, Samples]]  # model -> task -> samples


def compare(
    scored: Scored, arms: Mapping[str, TrainReport], candidate: str, draws: int, confidence: float
) -> Comparison:
    """Everything the gates and the table need. What was not measured is None; nothing is filled in.

    scored: samples by model name (base, lora, qlora, champion); candidate: the model that may be released.
    """
    nll = _paired(scored, "domain_nll")
    accuracy = _paired(scored, "domain_choice")
    kept, kept_interval = _retention(nll, candidate, draws, confidence)
    drop, drop_interval = _drop(accuracy, candidate, draws, confidence)
    memory, weights, speed = _costs(arms)
    return Comparison(
        candidate=candidate,
        nll_nats={name: per_token(s.values_I, s.tokens_I) for name, s in nll.items()},
        nll_gain_ci95=_nll_gains(nll, candidate, draws, confidence),
        accuracy={name: float(s.values_I.mean()) for name, s in accuracy.items()},
        accuracy_gain_ci95=_accuracy_gains(accuracy, draws, confidence),
        retention=kept,
        retention_ci95=kept_interval,
        accuracy_drop=drop,
        accuracy_drop_ci95=drop_interval,
        memory_saving=memory,
        weights_saving=weights,
        speed_ratio=speed,
        items=len(next(iter(nll.values())).row_ids) if nll else 0,
        claims=claims(kept, kept_interval, memory, speed),
    )


def _paired(scored: Scored, task: str) -> dict[str, Samples]:
    """The models' samples of a task; raises DataError if they are not of the same items in the same order."""
    found = {name: tasks[task] for name, tasks in scored.items() if task in tasks}
    rows = {tuple(samples.row_ids) for samples in found.values()}
    if len(rows) > 1:
        raise DataError(Problem("models were scored on different items", task, act="run again with --force"))
    return found


def _retention(
    nll: Mapping[str, Samples], candidate: str, draws: int, confidence: float
) -> tuple[float | None, Interval | None]:
    if candidate != "qlora" or not {"base", "lora", "qlora"} <= nll.keys():
        return None, None
    columns = (nll["base"].values_I, nll["qlora"].values_I, nll["lora"].values_I)
    value = retention(*columns)
    return (None if math.isnan(value) else value), retention_interval(*columns, draws=draws, confidence=confidence)


def _nll_gains(nll: Mapping[str, Samples], candidate: str, draws: int, confidence: float) -> dict[str, Interval]:
    """base minus each arm; for the champion, champion minus candidate."""
    gains: dict[str, Interval] = {}
    for name, samples in nll.items():
        before, after = ("champion", candidate) if name == "champion" else ("base", name)
        if name != "base" and before in nll and after in nll:
            pair = nll[before].values_I, nll[after].values_I
            gains[name] = gain_interval(*pair, samples.tokens_I, draws, confidence)
    return gains


def _accuracy_gains(accuracy: Mapping[str, Samples], draws: int, confidence: float) -> dict[str, Interval]:
    """each model minus base, in shares of items."""
    if "base" not in accuracy:
        return {}
    base = accuracy["base"].values_I
    ones = np.ones_like(base)
    return {
        name: gain_interval(samples.values_I, base, ones, draws, confidence)
        for name, samples in accuracy.items()
        if name != "base"
    }


def _drop(
    accuracy: Mapping[str, Samples], candidate: str, draws: int, confidence: float
) -> tuple[float | None, Interval | None]:
    """LoRA's accuracy minus the candidate's."""
    if not {"lora", candidate} <= accuracy.keys() or candidate == "lora":
        return None, None
    lost = accuracy["lora"].values_I - accuracy[candidate].values_I
    interval = bootstrap(lambda total, items: total / items, [lost, np.ones_like(lost)], draws, confidence)
    return float(lost.mean()), interval


def _costs(arms: Mapping[str, TrainReport]) -> tuple[float | None, float | None, float | None]:
    """(saving of peak memory, saving of weight memory, QLoRA's speed over LoRA's)."""
    if not {"lora", "qlora"} <= arms.keys():
        return None, None, None
    lora, qlora = arms["lora"], arms["qlora"]
    memory = 1 - qlora.peak_train_bytes / lora.peak_train_bytes
    weights = 1 - qlora.weights_bytes / lora.weights_bytes
    # On unlike threads or precision the ratio would measure the machine, not the method.
    same = (lora.threads, lora.precision, lora.device) == (qlora.threads, qlora.precision, qlora.device)
    return memory, weights, (qlora.useful_tokens_per_s / lora.useful_tokens_per_s if same else None)


def claims(kept: float | None, interval: Interval | None, memory: float | None, speed: float | None) -> list[str]:
    """The popular claims about QLoRA, each held against this run's numbers."""
    lines: list[str] = []
    if kept is not None and interval is not None:
        low, high = interval
        verdict = "holds" if low >= 0.99 else "does not hold" if high < 0.99 else "is not decided by these items"
        lines.append(
            f"'keeps 99 % of the quality' {verdict} on this run: {kept:.1%} of LoRA's loss gain [{low:.1%}, {high:.1%}]"
        )
    if memory is not None:
        verdict = "holds" if memory >= 0.59 else "does not hold"
        lines.append(f"'needs 59 % less memory' {verdict} on this run: peak memory {-memory:+.1%}")
    if speed is not None:
        slower = 1 / speed - 1
        verdict = "holds" if 0.20 <= slower <= 0.30 else "does not hold"
        lines.append(f"'runs 20-30 % slower' {verdict} on this run: time per token {slower:+.1%}")
    return lines
