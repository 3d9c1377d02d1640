"""How often the retention gate errs: simulated runs whose true retention is known, judged as a real run is.

`at the margin`: QLoRA keeps exactly min_retention (95 %) of LoRA's gain; a pass is false, and 5 % are allowed.
`no loss`: QLoRA keeps everything; whatever is not a pass is false. Items differ by 0.6 nats per token in what LoRA gains
(1.5 on average), by `--noise` in what QLoRA adds or takes, and seeds by `--seed-sd`.

    python -m benchmarks.gates [--runs 5000] [--noise 0.25] [--seed-sd 0.02]
"""

import argparse
from collections import Counter
from functools import cache

import numpy as np

from data_contracts.run_spec import GateSpec
from data_contracts.verdict import Estimate
from tasks.core import stats
from tasks.core.gates import decide
from tasks.core.stats import Bootstrap, Floats, ratio

MARGIN = GateSpec().min_retention or 0.95
CONFIDENCE = GateSpec().confidence
DRAWS = 2000
SETS_OF_DRAWS = 20  # of each size; one for all runs would give all of them the same error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=5000, help="with 1,000 items; with fewer items more, and fewer with more"
    )
    parser.add_argument("--noise", type=float, default=0.25, help="sd of an item's QLoRA loss, nats per token")
    parser.add_argument("--seed-sd", type=float, default=0.02, help="sd of an arm's loss between seeds, nats per token")
    arguments = parser.parse_args()
    print(f"{'':<34}{'at the margin':>16}{'no loss':>30}")
    print(f"{'items, seeds':<34}{'false pass':>16}{'false fail':>14}{'inconclusive':>16}")
    for seeds in (1, 3):
        for items in (200, 1000, 5000):
            tell(f"{items:,}, {seeds}", *(errors(items, seeds, kept, arguments) for kept in (MARGIN, 1.0)))
    stats.seed_weights = resampled_plainly
    tell("1,000, 3, seeds resampled plainly", *(errors(1000, 3, kept, arguments) for kept in (MARGIN, 1.0)))


def tell(name: str, margin: Counter[str], none_lost: Counter[str]) -> None:
    shares = (margin["pass"], none_lost["fail"], none_lost["inconclusive"])
    false_pass, false_fail, open_ = (count / margin.total() for count in shares)
    print(f"{name:<34}{false_pass:>16.1%}{false_fail:>14.1%}{open_:>16.1%}", flush=True)


def errors(items: int, seeds: int, kept: float, arguments: argparse.Namespace) -> Counter[str]:
    """Verdicts of many runs with a true retention of `kept`."""
    draw = np.random.default_rng([items, seeds, round(kept * 100)])
    return Counter(
        decide("at least", MARGIN, one_run(draw, items, seeds, kept, arguments, run))[0]
        for run in range(arguments.runs * 1000 // items)
    )


def one_run(
    draw: np.random.Generator, items: int, seeds: int, kept: float, arguments: argparse.Namespace, run: int
) -> Estimate:  # fmt: skip
    # One seed is judged as the adapter that it gave: between seeds nothing is claimed, so nothing is added.
    between = arguments.seed_sd if seeds > 1 else 0.0
    tokens_I = draw.integers(5, 60, items)
    gain_I = draw.normal(1.5, 0.6, items)
    lora_SI = gain_I + draw.normal(0, between, (seeds, 1)) + draw.normal(0, arguments.noise / 2, (seeds, items))
    own_SI = kept * gain_I + draw.normal(0, between, (seeds, 1)) + draw.normal(0, arguments.noise, (seeds, items))
    return draws_over(items, run % SETS_OF_DRAWS).estimate(ratio, own_SI * tokens_I, lora_SI * tokens_I)


@cache
def draws_over(items: int, number: int) -> Bootstrap:
    return Bootstrap([str(i) for i in range(items)], DRAWS, CONFIDENCE, number)


def resampled_plainly(draws: int, seeds: int) -> Floats:
    """What a hierarchical bootstrap usually does with seeds."""
    return np.random.default_rng(1).multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).astype(float)


if __name__ == "__main__":
    main()
