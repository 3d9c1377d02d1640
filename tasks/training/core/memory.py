"""Memory of one training step on one device, part by part, from an architecture's numbers. Bytes everywhere.

Static parts (weights, constants, adapters, optimiser) are exact; activations and logits follow from formulas.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from tasks.training.core.activations import Moment, alive
from tasks.training.core.architecture import Architecture
from tasks.training.core.memory_settings import FP32, Settings, state_bytes

NF4_BLOCK, CONSTANTS_BLOCK = 64, 256
# Code books kept with each quantised tensor: 16 NF4 levels; with double quantisation 256 levels and one offset, fp32.
NF4_CODE, CONSTANTS_CODE = 16 * FP32, 256 * FP32 + FP32
DeviceKind = Literal["cuda", "cpu"]
CONTEXT: dict[DeviceKind, int] = {"cuda": 500 * 2**20, "cpu": 700_000_000}
"""In addition to all tensors. CUDA: kernels and handles of a process, 300-800 MiB by card and version. CPU: the
interpreter and its libraries, 0.53 GB resident after import, 0.6-0.8 GB while training (docs/planner.md)."""
FRAGMENTATION = 0.08
"""What an allocator holds beyond what is in use, as a share of what comes and goes: it rounds blocks up and cannot
always use a free one again. The published pair (Answer.AI, 2 x 3090): 9.16 GiB allocated, 10.22 reserved."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of each part at the peak. `paged` of the optimiser may move to host memory when the card is full."""

    moment: Moment
    weights: int
    constants: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    slack: int
    context: int
    paged: int

    @property
    def static(self) -> int:
        return self.weights + self.constants + self.adapters + self.gradients + self.optimiser

    @property
    def allocated(self) -> int:
        """What tensors take at the peak: `torch.cuda.max_memory_allocated`."""
        return self.static + self.activations + self.logits

    @property
    def reserved(self) -> int:
        """What the allocator holds: `torch.cuda.max_memory_reserved`."""
        return self.allocated + self.slack

    @property
    def total(self) -> int:
        """What the card must have; on a CPU the process's resident memory."""
        return self.reserved + self.context


def predict(arch: Architecture, settings: Settings, device: DeviceKind = "cuda") -> MemoryParts:
    """Every part at the peak of one training step.

    The peak can be the loss (all activations, the logits), the final norm or the first block going backward, or the
    last block (its activations, all gradients). Gradients are freed after each step, unless they are summed over
    several.
    """
    trainable = settings.trainable(arch)
    count = sum(rows * columns for rows, columns in trainable)
    trained_bytes = settings.weight_bytes if settings.method == "full" else settings.stack.adapter_bytes
    weights, constants = base_bytes(arch, settings)
    states, paged = state_bytes(settings.optimiser, trainable, trained_bytes)
    gradients = count * trained_bytes
    held = gradients if settings.accumulation else 0
    # The peak is in the feed-forward part, where the last block's own gradients are still to come.
    last = gradients - gradients // arch.layers if settings.is_fused else gradients
    moments: list[tuple[Moment, int, int, int]] = [
        (moment, max(held, last) if moment == "last block backward" else held, *made)
        for moment, made in alive(arch, settings).items()
    ]
    moment, gradients, activations, logits = max(moments, key=lambda parts: sum(parts[1:]))
    return MemoryParts(
        moment=moment,
        weights=weights,
        constants=constants,
        adapters=0 if settings.method == "full" else count * trained_bytes * (2 if settings.takes_off_start else 1),
        gradients=gradients,
        optimiser=states,
        activations=activations,
        logits=logits,
        slack=int(FRAGMENTATION * (activations + logits)),
        context=CONTEXT[device],
        paged=paged,
    )


def base_bytes(arch: Architecture, settings: Settings) -> tuple[int, int]:
    """(weights, quantisation constants) of the base. NF4 and FP4: half a byte a weight, see `constant_bytes`."""
    other = FP32 if settings.is_quantised and settings.stack.kbit_upcast else settings.compute_bytes
    if not settings.is_quantised:
        return arch.parameters * settings.weight_bytes, 0
    tensors = [linear.weights for linear in arch.linears for _ in range(arch.layers)]
    packed = sum(ceil(weights / 2) for weights in tensors)
    constants = sum(constant_bytes(weights, double_quant=settings.double_quant) for weights in tensors)
    return packed + arch.other_parameters * other, constants


def constant_bytes(weights: int, *, double_quant: bool) -> int:
    """Constants of one NF4 tensor (arXiv 2305.14314, section 3; bitsandbytes QuantState).

    Plain: one fp32 absmax for each 64 weights, 0.5 bit a weight. Double: one byte for each 64 and one fp32 for each
    256 of those, 0.127 bit a weight. The code books come on top.
    """
    blocks = ceil(weights / NF4_BLOCK)
    if not double_quant:
        return blocks * FP32 + NF4_CODE
    return blocks + ceil(blocks / CONSTANTS_BLOCK) * FP32 + NF4_CODE + CONSTANTS_CODE
