"""What training should take by the formulas of `tunegate plan`, to be compared with what it took."""

from collections.abc import Iterator, Sequence

from data_contracts.errors import ConfigError
from data_contracts.jobs.training import TrainJob
from tasks.models.core.packing import ScoredSequence, Way, pack
from tasks.runtime.workers.device import Device
from tasks.runtime.workers.harness import say
from tasks.training.core.memory import predict
from tasks.training.core.memory_settings import Settings, StepShape, on_cpu, settings_of, unplanned
from tasks.training.workers.describe_base import architecture_at

_LARGEST = 16  # steps that are packed to find the largest
_STEP_KERNELS, _MOST_KERNELS = 30_000_000, 900_000_000
"""Bytes. oneDNN, which multiplies bf16 on a CPU, compiles kernels for every new shape and keeps about a thousand:
measured 30-45 MB a step, 0.9-1.1 GB in the end."""


def planned_memory(
    job: TrainJob, rows: Sequence[ScoredSequence], plan: Sequence[Sequence[int]], device: Device, way: Way
) -> dict[str, int] | None:
    """Parts of the peak of the plan's largest step, in bytes, as in a PlannedMemory: device memory on CUDA, resident
    memory on a CPU.

    None, with a note, for a base or an optimiser that the planner has no formulas for: it must not stop training.
    """
    try:
        if problem := unplanned(job.settings, job.method):
            raise ConfigError(problem)
        arch = architecture_at(str(job.base), revision=None)
    except ConfigError as error:
        say("note", text=f"memory of training is not planned: {error.problems[0].what}")
        return None
    on_cuda = device.device == "cuda"
    steps = (predict(arch, step, "cuda" if on_cuda else "cpu") for step in _largest_steps(job, rows, plan, device, way))
    parts = max(steps, key=lambda step: step.allocated if on_cuda else step.total)
    kernels = min(_STEP_KERNELS * len(plan), _MOST_KERNELS) if device.precision == "bf16" else 0
    return {
        "process": 0 if on_cuda else parts.context + parts.slack + kernels,
        "weights": parts.weights + parts.constants,
        "adapters": parts.adapters,
        "optimiser": parts.optimiser,
        "gradients": parts.gradients,
        "activations": parts.activations,
        "logits": parts.logits,
    }


def _largest_steps(
    job: TrainJob, rows: Sequence[ScoredSequence], plan: Sequence[Sequence[int]], device: Device, way: Way
) -> Iterator[Settings]:
    steps = [[rows[index] for index in batch] for batch in plan]
    for step in sorted(steps, key=lambda step: _tokens(step, way), reverse=True)[:_LARGEST]:
        settings = settings_of(job.settings, job.method, device.dtype.itemsize, _shape(step, way))
        yield settings if device.device == "cuda" else on_cpu(settings)


def _shape(step: Sequence[ScoredSequence], way: Way) -> StepShape:
    scored = sum(len(row.ids) - row.start for row in step)
    if way == "padded":
        return StepShape(_longest(step), len(step), scored, way="padded")
    packed = pack(step)
    return StepShape(len(packed.input_ids_T), 1, scored, packed.tree.seen)


def _tokens(step: Sequence[ScoredSequence], way: Way) -> int:
    return sum(len(row.ids) for row in step) if way == "packed" else len(step) * _longest(step)


def _longest(step: Sequence[ScoredSequence]) -> int:
    return max(len(row.ids) for row in step) - 1
