"""Statistics of the release candidate: against base and champion, by slice, in other tasks, in other forms."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from data_contracts.run_spec import GateSpec
from data_contracts.verdict import Estimate, SliceGain, TaskChange
from tasks.evaluation.core.samples import SLICES, Fact, Metric, Samples, ScoresByModel, clusters_of, gather
from tasks.evaluation.core.stats import Bootstrap, Floats, holm, mcnemar, proportion, ratio

NLL, STOPPED = "domain_nll.nll_nats", "domain_generate.stopped"
# Of a further task's metrics the first of these is compared.
_COMPARED = ("nll_nats", "accuracy", "acc_norm", "acc", "exact_match")
_MOST_SLICES = 20  # of a kind, of those too small for the gate: nobody reads a thousand files as slices


class CandidateStatistics(NamedTuple):
    """The fields of a Comparison that are about the released adapter."""

    stop_rate: Estimate | None
    general: list[TaskChange]
    slices: list[SliceGain]
    forms: dict[str, Estimate]
    gain: Estimate | None = None
    champion_gain: Estimate | None = None


def candidate_statistics(
    scored: ScoresByModel, facts: Mapping[str, Fact], released: str, draws: Bootstrap | None, settings: GateSpec
) -> CandidateStatistics:
    """What was not measured is None or empty. draws: over the items of domain_nll."""
    forms = {name.removeprefix(f"{released}-on-"): [name] for name in scored if name.startswith(f"{released}-on-")}
    models = {name: [name] for name in ("base", "champion", released) if name in scored}
    nll = gather(scored, NLL, models | forms)
    stopped = scored.get(released, {}).get(STOPPED)
    rate = proportion(stopped.values_I, settings.confidence, clusters_of(stopped.row_ids, facts)) if stopped else None
    general = _general(scored, released, settings)
    if nll is None or draws is None or released not in nll.values:
        return CandidateStatistics(stop_rate=rate, general=general, slices=[], forms={})
    own = nll.first(released)

    def gain_over(model: str) -> Estimate | None:
        return draws.estimate(ratio, nll.first(model) - own, nll.tokens_I) if model in nll.values else None

    lost = nll.first("base") - own if "base" in nll.values else None
    return CandidateStatistics(
        gain=gain_over("base"),
        champion_gain=gain_over("champion"),
        slices=[] if lost is None else list(_slices(lost, nll, facts, draws, settings.min_slice_items)),
        forms={form: found for form in forms if (found := gain_over(form))},
        stop_rate=rate,
        general=general,
    )


def _slices(
    gain_I: Floats, nll: Metric, facts: Mapping[str, Fact], draws: Bootstrap, min_items: int
) -> Iterator[SliceGain]:
    """Every slice of at least `min_items` items, and the largest others. Items outside a slice have weight zero, so that all
    slices share the same draws."""
    if not all(row in facts for row in nll.row_ids):
        return
    for kind in SLICES:
        names = [getattr(facts[row], kind) for row in nll.row_ids]
        counts = Counter(names)
        if len(counts) < 2:
            continue  # it is all items
        large = [item for item in counts.items() if item[1] >= min_items]
        for name, items in sorted({*large, *counts.most_common(_MOST_SLICES)}):
            inside = np.array([other == name for other in names], dtype=float)
            gain = draws.estimate(ratio, gain_I * inside, nll.tokens_I * inside)
            yield SliceGain(kind=kind, name=name, items=items, gain=gain)


def _general(scored: ScoresByModel, released: str, settings: GateSpec) -> list[TaskChange]:
    """The released adapter against the base in every task beyond the domain in which both were scored."""
    base, own = scored.get("base", {}), scored.get(released, {})
    changes = []
    for task, metric in _beyond(own):
        name = f"{task}.{metric}"
        pair = gather(scored, name, {"base": ["base"], released: [released]})
        if name in base and pair:
            changes.append(_change(task, metric, base[name], own[name], settings))
    adjusted = holm({change.task: change.p for change in changes if change.p is not None})
    return [change.model_copy(update={"p": adjusted.get(change.task)}) for change in changes]


def _beyond(samples: Mapping[str, Samples]) -> Iterator[tuple[str, str]]:
    """(task, metric) of each task that is not made from the test split."""
    split = [name.rpartition(".") for name in samples if not name.startswith("domain_")]
    for task in sorted({task for task, _, _ in split}):
        metrics = {metric for other, _, metric in split if other == task}
        yield from [(task, metric) for metric in _COMPARED if metric in metrics][:1]


def _change(task: str, metric: str, base: Samples, own: Samples, settings: GateSpec) -> TaskChange:
    draws = Bootstrap(base.row_ids, settings.bootstrap_draws, settings.confidence)
    is_loss = metric == "nll_nats"
    weights = base.tokens_I if is_loss else np.ones_like(base.values_I)
    better = base.values_I - own.values_I if is_loss else own.values_I - base.values_I
    means = [float((samples.values_I).sum() / weights.sum()) for samples in (base, own)]
    change = draws.estimate(ratio, better, weights) if is_loss else draws.shares(better)
    p = None if is_loss else mcnemar(int((better < 0).sum()), int((better > 0).sum()))
    return TaskChange(
        task=task, metric=metric, items=len(base.row_ids), base=means[0], candidate=means[1], change=change, p=p
    )
