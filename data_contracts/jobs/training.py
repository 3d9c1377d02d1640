"""What the workers of `tasks/training` get: a base to describe, and one arm to train."""

from pathlib import Path

from data_contracts.jobs import Job
from data_contracts.train_spec import LORA_ARMS, Method, TrainSpec


class DescribeBaseJob(Job):
    base: str  # a folder or a hub id
    revision: str | None


class TrainJob(Job):
    """One arm.

    settings: as this arm sees them: learning_rate is its own; what only chooses or places arms is at its default.
    """

    method: Method
    seed: int
    base: Path
    base_name: str  # written into the adapter's configuration: no path of this machine
    step0: Path | None  # None for `full`, which starts from the base
    train: Path  # JSONL of rows
    validation: Path  # the same
    precision: str  # auto, fp32 or bf16
    threads_reason: str | None  # why settings.threads; None: the user set it, or nobody did
    settings: TrainSpec

    @property
    def processes(self) -> int:
        return self.settings.workers

    @property
    def on_ray(self) -> bool:
        return self.settings.engine == "ray"

    @property
    def is_full(self) -> bool:
        return self.method == "full"

    @property
    def has_lora(self) -> bool:
        return self.method in LORA_ARMS

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided among the ranks."""
        return self.settings.sharding != "none"
