"""What is said of the one adapter that may be released: against base and champion, by slice, elsewhere, in other forms."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_contracts.run_spec import GateSpec
from data_contracts.verdict import SliceGain, TaskChange
from tasks.evaluation.core.samples import SLICES, Fact, Metric, Samples, Scored, clusters_of, gather
from tasks.evaluation.core.stats import Bootstrap, holm, mcnemar, proportion, ratio

NLL, STOPPED = "domain_nll.nll_nats", "domain_generate.stopped"
# Of a further task's metrics the first of these is compared.
_COMPARED = ("nll_nats", "accuracy", "acc_norm", "acc", "exact_match")
_MOST_SLICES = 20  # of a kind, of those too small to be judged: nobody reads a thousand files as slices


def judge_released(
    scored: Scored, facts: Mapping[str, Fact], released: str, draws: Bootstrap | None, settings: GateSpec
) -> dict[str, Any]:
    """The fields of a Comparison that are about the released adapter. draws: over the items of domain_nll."""
    forms = {name.removeprefix(f"{released}-on-"): [name] for name in scored if name.startswith(f"{released}-on-")}
    models = {name: [name] for name in ("base", "champion", released) if name in scored}
    nll = gather(scored, NLL, models | forms)
    found: dict[str, Any] = {"gain": None, "champion_gain": None, "slices": [], "forms": {}}
    if nll and draws and released in nll.values:
        own = nll.first(released)
        if "base" in nll.values:
            lost = nll.first("base") - own
            found |= {"gain": draws.estimate(ratio, lost, nll.tokens_I)}
            found |= {"slices": list(_slices(lost, nll, facts, draws, settings.min_slice_items))}
        if "champion" in nll.values:
            found["champion_gain"] = draws.estimate(ratio, nll.first("champion") - own, nll.tokens_I)
        found["forms"] = {
            form: draws.estimate(ratio, nll.first(form) - own, nll.tokens_I) for form in forms if form in nll.values
        }
    stopped = scored.get(released, {}).get(STOPPED)
    rate = proportion(stopped.values_I, settings.confidence, clusters_of(stopped.row_ids, facts)) if stopped else None
    return found | {"stop_rate": rate, "general": _general(scored, released, settings)}


def _slices(gain_I: Any, nll: Metric, facts: Mapping[str, Fact], draws: Bootstrap, judged: int) -> Iterator[SliceGain]:
    """Every slice of as many items as are judged, and the largest others. Items outside a slice count nothing, so that every
    slice is seen through the same draws."""
    if not all(row in facts for row in nll.row_ids):
        return
    for kind in SLICES:
        names = [getattr(facts[row], kind) for row in nll.row_ids]
        counts = Counter(names)
        if len(counts) < 2:
            continue  # it is the whole
        large = [item for item in counts.items() if item[1] >= judged]
        for name, items in sorted({*large, *counts.most_common(_MOST_SLICES)}):
            inside = np.array([other == name for other in names], dtype=float)
            gain = draws.estimate(ratio, gain_I * inside, nll.tokens_I * inside)
            yield SliceGain(kind=kind, name=name, items=items, gain=gain)


def _general(scored: Scored, released: str, settings: GateSpec) -> list[TaskChange]:
    """The released adapter against the base in every task beyond the domain that both were scored in."""
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
