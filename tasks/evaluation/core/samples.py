"""Per-item scores of a model, read from its files, and one metric of several models on the same items."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_contracts.errors import DataError, Problem
from tasks.evaluation.core.stats import Floats

SLICES = ("source", "language", "length", "field")


@dataclass(frozen=True)
class Samples:
    """One metric of one task, per item: I row ids, values and tokens."""

    row_ids: list[str]
    values_I: Floats
    tokens_I: Floats


@dataclass(frozen=True)
class Fact:
    """What is known of a domain item, the same for every model. cluster: items that share an answer, or a value
    of data.cluster_field, have the same."""

    row_id: str
    cluster: str
    bytes: int
    source: str
    language: str
    length: str
    field: str = "none"


ScoresByModel = Mapping[str, Mapping[str, Samples]]  # model -> "task.metric" -> samples


def read_samples(lines: Iterable[str]) -> dict[str, Samples]:
    """Per-item values by "task.metric", from the lines of a samples file, each a JSON object."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    for line in lines:
        sample = json.loads(line)
        name = f"{sample['task']}.{sample['metric']}"
        found.setdefault(name, []).append((sample["row_id"], sample["value"], sample["tokens"] or 1.0))
    return {
        name: Samples([r for r, _, _ in rows], np.array([v for _, v, _ in rows]), np.array([t for _, _, t in rows]))
        for name, rows in found.items()
    }


def read_facts(lines: Iterable[str]) -> dict[str, Fact]:
    """Facts by row id, from the lines of a facts file."""
    facts = (Fact(**json.loads(line)) for line in lines)
    return {fact.row_id: fact for fact in facts}


def clusters_of(row_ids: Sequence[str], facts: Mapping[str, Fact]) -> list[str]:
    """The cluster of each item; one without facts is a cluster of its own."""
    return [facts[row].cluster if row in facts else row for row in row_ids]


@dataclass(frozen=True)
class Metric:
    """One metric of all models on the same items. values: model or arm -> [S, I], seeds by items."""

    row_ids: list[str]
    tokens_I: Floats
    values: dict[str, Floats]

    def first(self, model: str) -> Floats:
        values: Floats = self.values[model][0]
        return values


def gather(scored: ScoresByModel, metric: str, models: Mapping[str, Sequence[str]]) -> Metric | None:
    """A metric of the models; None if none has it. models: arm -> its targets, one for each seed.

    Raises DataError if they were not scored on the same items in the same order. An arm that lacks a seed's is left out.
    """
    having = {
        model: [scored[target][metric] for target in targets]
        for model, targets in models.items()
        if all(metric in scored.get(target, {}) for target in targets)
    }
    every = [samples for found in having.values() for samples in found]
    if not every:
        return None
    if any(samples.row_ids != every[0].row_ids for samples in every):
        raise DataError(Problem("models were scored on different items", metric, act="run again with --force"))
    values = {model: np.stack([samples.values_I for samples in found]) for model, found in having.items()}
    return Metric(every[0].row_ids, every[0].tokens_I, values)
