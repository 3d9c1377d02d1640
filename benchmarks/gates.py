"""How often the retention gate errs: simulated runs whose true retention is known, through the gate of a real run.

`at the margin`: QLoRA keeps exactly min_retention (95 %) of LoRA's gain; a pass is false, and 5 % are allowed.
`no loss`: QLoRA keeps everything; whatever is not a pass is false. Items differ by 0.6 nats per token in what LoRA gains
(1.5 on average), by `--noise` in what QLoRA adds or takes, and seeds by `--seed-sd`. Where items come in clusters (a
patient, a manual; the largest holds about ten times as many as the smallest), half of the noise's variance is theirs.

    python -m benchmarks.gates [--runs 5000] [--noise 0.25] [--seed-sd 0.02]
"""

import argparse
from collections import Counter
from functools import cache
from typing import NamedTuple

import numpy as np

from data_contracts.run_spec import GateSpec
from data_contracts.verdict import Estimate
from tasks.evaluation.core import stats
from tasks.evaluation.core.gates import interval_verdict
from tasks.evaluation.core.stats import Bootstrap, Floats, ratio

MARGIN = GateSpec().min_retention or 0.95
CONFIDENCE = GateSpec().confidence
DRAWS = 2000
SETS_OF_DRAWS = 20  # of each size; one for all runs would give all of them the same error


class Case(NamedTuple):
    items: int
    seeds: int
    clusters: int | None = None  # None: every item stands alone
    named: bool = True  # whether the statistics know the clusters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=5000, help="with 1,000 items; with fewer items more, and fewer with more"
    )
    parser.add_argument("--noise", type=float, default=0.25, help="sd of an item's QLoRA loss, nats per token")
    parser.add_argument("--seed-sd", type=float, default=0.02, help="sd of an arm's loss between seeds, nats per token")
    arguments = parser.parse_args()
    print(f"{'':<42}{'at the margin':>16}{'no loss':>30}")
    print(f"{'items, seeds':<42}{'false pass':>16}{'false fail':>14}{'inconclusive':>16}")
    for seeds in (1, 3):
        for items in (200, 1000, 5000):
            print_line(f"{items:,}, {seeds}", Case(items, seeds), arguments)
    for clusters in (20, 100):
        print_line(f"1,000 in {clusters} clusters, 1", Case(1000, 1, clusters), arguments)
    print_line("1,000 in 100 clusters, 1, not named", Case(1000, 1, 100, named=False), arguments)
    stats.seed_weights = resampled_plainly
    print_line("1,000, 3, seeds resampled plainly", Case(1000, 3), arguments)


def print_line(name: str, case: Case, arguments: argparse.Namespace) -> None:
    margin, none_lost = (errors(case, kept, arguments) for kept in (MARGIN, 1.0))
    shares = (margin["pass"], none_lost["fail"], none_lost["inconclusive"])
    false_pass, false_fail, open_ = (count / margin.total() for count in shares)
    print(f"{name:<42}{false_pass:>16.1%}{false_fail:>14.1%}{open_:>16.1%}", flush=True)


def errors(case: Case, kept: float, arguments: argparse.Namespace) -> Counter[str]:
    """Verdicts of many runs with a true retention of `kept`."""
    draw = np.random.default_rng([case.items, case.seeds, round(kept * 100)])
    return Counter(
        interval_verdict("at least", MARGIN, one_run(draw, case, kept, arguments, run))[0]
        for run in range(arguments.runs * 1000 // case.items)
    )


def one_run(draw: np.random.Generator, case: Case, kept: float, arguments: argparse.Namespace, run: int) -> Estimate:
    items, seeds, _, named = case
    # A verdict on one seed is about the adapter that it gave: nothing is claimed between seeds, so nothing is added.
    between = arguments.seed_sd if seeds > 1 else 0.0
    tokens_I = draw.integers(5, 60, items)
    gain_I = draw.normal(1.5, 0.6, items)
    lora_SI = gain_I + draw.normal(0, between, (seeds, 1)) + draw.normal(0, arguments.noise / 2, (seeds, items))
    own_SI = kept * gain_I + draw.normal(0, between, (seeds, 1)) + noise(draw, case, arguments.noise)
    draws = draws_over(items, case.clusters if named else None, run % SETS_OF_DRAWS)
    return draws.estimate(ratio, own_SI * tokens_I, lora_SI * tokens_I)


def noise(draw: np.random.Generator, case: Case, sd: float) -> Floats:
    """[S, I]"""
    alone = draw.normal(0, sd, (case.seeds, case.items))
    if case.clusters is None:
        return alone
    common: Floats = draw.normal(0, sd, case.clusters)[clusters_of(case.items, case.clusters)]
    return (alone + common) / np.sqrt(2)


@cache
def clusters_of(items: int, clusters: int | None) -> "np.typing.NDArray[np.int64]":
    """The cluster of every item; the last is ten times as large as the first."""
    if clusters is None:
        return np.arange(items)
    ends = np.cumsum(np.linspace(1, 10, clusters))
    return np.searchsorted(ends / ends[-1], (np.arange(items) + 0.5) / items)


@cache
def draws_over(items: int, clusters: int | None, number: int) -> Bootstrap:
    return Bootstrap([str(name) for name in clusters_of(items, clusters)], DRAWS, CONFIDENCE, number)


def resampled_plainly(draws: int, seeds: int) -> Floats:
    """What a hierarchical bootstrap usually does with seeds."""
    return np.random.default_rng(1).multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).astype(float)


if __name__ == "__main__":
    main()
