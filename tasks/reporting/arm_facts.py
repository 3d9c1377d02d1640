"""What is told of a trained arm beside its scores: its memory by part, and what was chosen for it with the reason."""

from typing import NamedTuple

from data_contracts.reports import TrainReport

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
