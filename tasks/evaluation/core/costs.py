"""QLoRA's costs compared with LoRA's, and popular claims about QLoRA checked against this run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_contracts.reports import TrainReport
from data_contracts.run_spec import GateSpec
from data_contracts.verdict import Claim, Estimate
from tasks.evaluation.core.stats import Bootstrap, ratio


class Costs(NamedTuple):
    """QLoRA against LoRA over the seeds. None where one of them is missing, or where they ran in other conditions."""

    memory_saving: Estimate | None = None  # of the peak; its ends are the lowest and highest of the seeds
    weights_saving: float | None = None
    speed_ratio: Estimate | None = None  # tokens per second over LoRA's, from the steps that both took


def measure_costs(arms: Sequence[TrainReport], settings: GateSpec) -> Costs:
    pairs = _pairs(arms)
    if not pairs:
        return Costs()
    savings = [1 - qlora.peak_train_bytes / lora.peak_train_bytes for lora, qlora in pairs]
    memory = Estimate(value=float(np.mean(savings)), low=min(savings), high=max(savings), error=0.0)
    lora, qlora = pairs[0]
    return Costs(memory, 1 - qlora.weights_bytes / lora.weights_bytes, _speed(pairs, settings))


def _pairs(arms: Sequence[TrainReport]) -> list[tuple[TrainReport, TrainReport]]:
    """LoRA and QLoRA of the same seed."""
    lora = {arm.seed: arm for arm in arms if arm.arm == "lora"}
    return [(lora[arm.seed], arm) for arm in arms if arm.arm == "qlora" and arm.seed in lora]


def _speed(pairs: list[tuple[TrainReport, TrainReport]], settings: GateSpec) -> Estimate | None:
    """Both arms take the same steps on the same rows, so their seconds are paired by step; the first warms up."""
    for lora, qlora in pairs:
        # With other threads or precision the ratio would measure the machine, not the method.
        if _conditions(lora) != _conditions(qlora) or len(lora.loss) < 3:
            return None
    if len({len(lora.loss) for lora, _ in pairs}) > 1:
        return None  # an arm stopped early: its steps have no partner in another seed
    slow, fast = (np.array([[p.seconds for p in pair[side].loss[1:]] for pair in pairs]) for side in (1, 0))
    steps = [str(step) for step in range(slow.shape[1])]
    return Bootstrap(steps, settings.bootstrap_draws, settings.confidence).estimate(ratio, fast, slow)


def _conditions(arm: TrainReport) -> tuple[object, ...]:
    return (arm.threads, arm.precision, arm.device, arm.workers, arm.side_by_side, len(arm.loss))


def claims(retention: Estimate | None, costs: Costs, arms: Sequence[TrainReport] = ()) -> list[Claim]:
    """The popular claims about QLoRA against this run's numbers; none if the run has no LoRA to compare with."""
    at_once = max((arm.side_by_side for pair in _pairs(arms) for arm in pair), default=1)
    slower_than = "more time a token" + (f", up to {at_once} arms training side by side" if at_once > 1 else "")
    if retention is None and costs.memory_saving is None:
        return []
    slower = costs.speed_ratio and Estimate(
        value=1 / costs.speed_ratio.value - 1,
        low=1 / costs.speed_ratio.high - 1,
        high=1 / costs.speed_ratio.low - 1,
        error=costs.speed_ratio.error,
    )
    return [
        _claim("needs 59 % less memory", _MEMORY, costs.memory_saving, (0.59, np.inf), "less peak memory"),
        _claim("runs 20 to 30 % slower", _SPEED, slower, (0.20, 0.30), slower_than),
        _claim("keeps 99 % of the quality", _QUALITY, retention, (0.99, np.inf), "of LoRA's loss gain kept"),
    ]


_MEMORY = "articles; measured in one setup each: 34 % at 2B to 58 % at 13B (LlamaFactory's paper, table 4)"
_SPEED = "articles; published measurements range from 49 % less time to 150 % more"
_QUALITY = "articles; in arXiv 2305.14314 99.3 % is Guanaco's score against ChatGPT's, not a share of LoRA's gain"


def _claim(claim: str, source: str, found: Estimate | None, span: tuple[float, float], what: str) -> Claim:
    if found is None or not np.isfinite(found.value):
        return Claim(claim=claim, source=source, measured=None, verdict="cannot tell", note="not measured in this run")
    inside = span[0] <= found.low and found.high <= span[1]
    outside = found.high < span[0] or found.low > span[1]
    note = f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}] {what}"
    verdict = "holds" if inside else "does not hold" if outside else "cannot tell"
    return Claim.model_validate({"claim": claim, "source": source, "measured": found, "verdict": verdict, "note": note})
