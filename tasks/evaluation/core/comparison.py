"""QLoRA against LoRA and base: differences paired by item, over the seeds of each arm, each with its interval."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from data_contracts.reports import TrainReport
from data_contracts.run_spec import GateSpec
from data_contracts.verdict import Comparison, Estimate, Flips
from tasks.evaluation.core.candidate import NLL, candidate_statistics
from tasks.evaluation.core.costs import claims, measure_costs
from tasks.evaluation.core.samples import Fact, Metric, ScoresByModel, clusters_of, gather
from tasks.evaluation.core.stats import Bootstrap, detectable, mcnemar, ratio

ACCURACY = "domain_choice.accuracy"


def compare_arms(
    scored: ScoresByModel, facts: Mapping[str, Fact], arms: Sequence[TrainReport], candidate: str, released: str,
    settings: GateSpec,
) -> Comparison:  # fmt: skip
    """Everything the gates and the tables need. What was not measured is None or absent; nothing is filled in.

    scored: samples by target: base, trained adapters by name, champion. candidate: the arm, released: its one adapter, that
    may be registered.
    """
    models = targets_by_model(scored, arms)
    nll, accuracy = gather(scored, NLL, models), gather(scored, ACCURACY, models)
    loss_draws, accuracy_draws = (bootstrap(metric, facts, settings) if metric else None for metric in (nll, accuracy))
    kept = _retention(nll, loss_draws, candidate)
    drop = _drop(accuracy, accuracy_draws, candidate)
    costs = measure_costs(arms, settings)
    found = {"retention": kept, "accuracy_drop": drop}
    return Comparison(
        candidate=candidate,
        released=released,
        items=len(nll.row_ids) if nll else 0,
        clusters=loss_draws.clusters if loss_draws else 0,
        seeds=max((len(targets) for targets in models.values()), default=1),
        nll_nats=_losses(nll),
        bits_per_byte=_bits(nll, facts),
        seed_sd=_seed_sd(nll),
        gains=_gains(nll, loss_draws),
        accuracy={name: float(values.mean()) for name, values in accuracy.values.items()} if accuracy else {},
        accuracy_gains=_accuracy_gains(accuracy, accuracy_draws),
        **found,
        flips=_flips(accuracy, candidate),
        **costs._asdict(),
        detectable={name: detectable(item.error, settings.confidence) for name, item in found.items() if item},
        claims=claims(kept, costs, arms),
        **candidate_statistics(scored, facts, released, loss_draws, settings)._asdict(),
    )


def targets_by_model(scored: ScoresByModel, arms: Sequence[TrainReport]) -> dict[str, list[str]]:
    """Each arm's targets, one for each seed in order. Base and champion have one each."""
    models: dict[str, list[str]] = {name: [name] for name in ("base", "candidate", "champion") if name in scored}
    for arm in arms:
        models.setdefault(arm.arm, []).append(arm.name)
    return models


def bootstrap(metric: Metric, facts: Mapping[str, Fact], settings: GateSpec) -> Bootstrap:
    """Draws over the clusters of a metric's items."""
    return Bootstrap(clusters_of(metric.row_ids, facts), settings.bootstrap_draws, settings.confidence)


def _has_lora(metric: Metric, candidate: str) -> bool:
    """Whether there is a LoRA arm to compare the candidate with."""
    return candidate != "lora" and {"lora", candidate} <= metric.values.keys()


def _losses(nll: Metric | None) -> dict[str, float]:
    if nll is None:
        return {}
    return {name: float(values.mean(axis=0).sum() / nll.tokens_I.sum()) for name, values in nll.values.items()}


def _bits(nll: Metric | None, facts: Mapping[str, Fact]) -> dict[str, float]:
    """Loss in bits per byte of the answers: unlike nats per token it can be compared between tokenizers."""
    if nll is None or not all(row in facts for row in nll.row_ids):
        return {}
    count = sum(facts[row].bytes for row in nll.row_ids)
    return {
        name: float(values.mean(axis=0).sum() / math.log(2) / count) for name, values in nll.values.items() if count
    }


def _seed_sd(nll: Metric | None) -> dict[str, float]:
    if nll is None:
        return {}
    per_seed = {name: values.sum(axis=1) / nll.tokens_I.sum() for name, values in nll.values.items()}
    return {name: float(np.std(losses, ddof=1)) for name, losses in per_seed.items() if len(losses) > 1}


def _gains(nll: Metric | None, draws: Bootstrap | None) -> dict[str, Estimate]:
    """base minus each arm, in nats per token."""
    if nll is None or draws is None or "base" not in nll.values:
        return {}
    base = nll.first("base")
    arms = {name: values for name, values in nll.values.items() if name not in ("base", "champion")}
    return {name: draws.estimate(ratio, base - values, nll.tokens_I) for name, values in arms.items()}


def _retention(nll: Metric | None, draws: Bootstrap | None, candidate: str) -> Estimate | None:
    """(loss of base - loss of the candidate) / (loss of base - loss of LoRA), both from the same seeds; None without LoRA.

    Token counts cancel. Its value is NaN if LoRA has gained nothing.
    """
    if nll is None or draws is None or "base" not in nll.values or not _has_lora(nll, candidate):
        return None
    base = nll.first("base")
    return draws.estimate(ratio, base - nll.values[candidate], base - nll.values["lora"])


def _accuracy_gains(accuracy: Metric | None, draws: Bootstrap | None) -> dict[str, Estimate]:
    """each arm minus base, in shares of the items."""
    if accuracy is None or draws is None or "base" not in accuracy.values:
        return {}
    base = accuracy.first("base")
    return {name: draws.shares(values - base) for name, values in accuracy.values.items() if name != "base"}


def _drop(accuracy: Metric | None, draws: Bootstrap | None, candidate: str) -> Estimate | None:
    """LoRA's accuracy minus the candidate's."""
    if accuracy is None or draws is None or not _has_lora(accuracy, candidate):
        return None
    return draws.shares(accuracy.values["lora"] - accuracy.values[candidate])


def _flips(accuracy: Metric | None, candidate: str) -> Flips | None:
    """Between the first seeds of LoRA and candidate."""
    if accuracy is None or not _has_lora(accuracy, candidate):
        return None
    change = accuracy.first(candidate) - accuracy.first("lora")
    lost, won = int((change < 0).sum()), int((change > 0).sum())
    return Flips(lost=lost, won=won, rate=(lost + won) / len(change), p=mcnemar(lost, won))
