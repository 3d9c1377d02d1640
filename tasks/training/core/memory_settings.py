"""What is trained and with which software: all that memory depends on next to the architecture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from data_contracts.errors import Problem
from data_contracts.train_spec import LORA_ARMS, Method, TrainSpec
from tasks.models.core.packing import Way
from tasks.training.core.architecture import Architecture, Linear

FP32, FP16 = 4, 2


@dataclass(frozen=True)
class Stack:
    """How the training software keeps things. The defaults are Tunegate's own packed step
    (tasks/models/workers/scoring.py)."""

    adapter_bytes: int = FP32
    """PEFT keeps adapters in fp32 (`autocast_adapter_dtype`); torchtune, litgpt and fsdp_qlora in the base's format."""
    full_bytes: int = FP32
    """Of every weight where all are trained: Tunegate keeps fp32 ones and computes in the compute format."""
    autocast: bool = True
    """Trainer's `bf16=True`: fp32 adapters and their inputs are cast to 16 bit for each product."""
    fused: bool = True
    """A LoRA layer is one node, which keeps its input and the low-rank product (tasks/models/workers/fused_layers.py);
    not while dropout is at work. What is alive at the model's ends (embedding, final norm) is then counted to the
    tensor. A frozen norm is one node too (tasks/models/workers/fused_layers.py)."""
    mask: Literal["segments", "node", "padded", "none"] = "segments"
    """What attention gets. Segments of a prefix tree: keys and values of every head for each segment, and a mask for
    those that follow others; as one node, on a CPU: keys and values once. Padded: a mask kept by every layer, keys and
    values for every head. None: FlashAttention."""
    eager_attention: bool = False
    """Attention that keeps the scores of every pair of tokens: in fp32, in the compute format, and before a softcap."""
    norm_bytes: int = FP32
    """transformers' RMSNorm keeps its input in fp32; compiled and fused ones keep it in the compute format, as ours
    does."""
    loss: Literal["frozen head", "fp32", "compute", "chunked", "padded"] = "frozen head"
    """The loss over the vocabulary. Frozen head: 16 MiB of logits at a time (tasks/models/workers/head_loss.py). fp32,
    compute: one cross-entropy in that format; chunked: torchtune's compiled one, in eight chunks. Padded: logits of all
    tokens."""
    loss_copies: float = 0.0
    """Further copies of the logits in the loss's format that outlive it, as outputs that the caller holds."""
    noise_bytes: int = 1
    """Of dropout's mask, an element: CUDA keeps a byte, a CPU fp32 noise."""
    quantised_inputs: bool = False
    """bitsandbytes before 0.43 kept the input of every quantised layer, although a frozen one needs none."""
    adapter_outputs: bool = False
    """litgpt's joint q/v adapter keeps its output before padding it."""
    kbit_upcast: bool = False
    """PEFT's `prepare_model_for_kbit_training`: everything that is not quantised becomes fp32. Tunegate leaves it
    out."""


PADDED_STACK = Stack(mask="padded", loss="padded", eager_attention=True)
"""Tunegate's step for a base that cannot be packed."""

PREFIX_STACK = Stack(mask="padded", loss="padded")
"""Tunegate's step for a prefix, which cannot be packed either, on a base that can."""

Segments = tuple[tuple[int, int], ...]
"""Of each segment of a packed row: its own tokens, and those it sees: its own and all that it follows."""


@dataclass(frozen=True)
class Settings:
    """What is trained, and how. `tokens` in one forward pass, in rows of `length`; `scored` of them have a loss.

    segments: those of a real packed row of `length` tokens; None where only rows are known.
    """

    method: Method
    length: int
    batch: int = 1
    scored: int | None = None
    rank: int = 16
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    compute_bytes: int = FP16
    double_quant: bool = True
    optimiser: str = "adamw_torch"
    checkpointing: bool = False
    accumulation: bool = False
    stack: Stack = Stack()
    segments: Segments | None = None
    takes_off_start: bool = False
    """PiSSA and OLoRA: each adapter has a frozen copy of its start, and twice the rank in its products."""
    prefix_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def attended(self) -> int:
        """Tokens whose keys and values a packed row keeps: shared ones again for each segment that follows them."""
        return self.tokens if self.segments is None else sum(seen for _, seen in self.segments)

    @property
    def mask_cells(self) -> int:
        """Elements of a packed row's masks. Rows start alike (one chat template): all but the first follow others."""
        if self.segments is None:
            return (self.batch - 1) * self.length**2
        return sum(own * seen for own, seen in self.segments if own < seen)

    @property
    def is_quantised(self) -> bool:
        return self.method == "qlora"

    @property
    def has_lora(self) -> bool:
        return self.method in LORA_ARMS

    @property
    def weight_bytes(self) -> int:
        """Of a weight of the base that is not quantised."""
        return self.stack.full_bytes if self.method == "full" else self.compute_bytes

    @property
    def computed_rank(self) -> int:
        return 2 * self.rank if self.takes_off_start else self.rank

    def adapted(self, arch: Architecture) -> list[Linear]:
        """The linear layers of one block that get an adapter."""
        if not self.has_lora:
            return []
        if self.targets == "all-linear":
            return list(arch.linears)
        names = [self.targets] if isinstance(self.targets, str) else self.targets
        return [linear for linear in arch.linears if linear.name in names]

    def trainable(self, arch: Architecture) -> list[tuple[int, int]]:
        """(rows, columns) of every trained tensor: A [rank, inputs] and B [outputs, rank] of each adapted layer; all
        weights; or a prefix's keys and values in every layer."""
        if self.method == "full":
            return [(1, arch.parameters)]
        if self.method == "prefix":
            return [(self.prefix_tokens, arch.layers * 2 * arch.kv_heads * arch.head_dim)]
        pairs = [
            shape
            for linear in self.adapted(arch)
            for shape in ((self.rank, linear.inputs), (linear.outputs, self.rank))
        ]
        return pairs * arch.layers

    @property
    def is_fused(self) -> bool:
        return self.has_lora and self.stack.fused and self.dropout == 0

    def is_mlp_fused(self, arch: Architecture) -> bool:
        """The feed-forward part is one node (tasks/models/workers/fused_layers.py), which makes what `down` reads a
        second time."""
        names = {linear.name for linear in self.adapted(arch)}
        return self.is_fused and arch.swiglu and names >= {"gate_proj", "up_proj", "down_proj"}

    @property
    def norms_are_fused(self) -> bool:
        return self.stack.fused and self.method != "full"

    @property
    def casts(self) -> bool:
        """Adapters have another format than the base's arithmetic, so their inputs are copied."""
        return self.has_lora and not self.is_fused and self.stack.adapter_bytes != self.compute_bytes


@dataclass(frozen=True)
class StepShape:
    """The rows of one forward pass. scored: tokens with a loss; None plans for a loss on all of them.

    For one packed row of T tokens, as the training worker has at hand: length T, batch 1, its completion tokens and its
    segments.
    """

    length: int
    batch: int = 1
    scored: int | None = None
    segments: Segments | None = None
    way: Way = "packed"


def settings_of(train: TrainSpec, method: Method, compute_bytes: int, shape: StepShape) -> Settings:
    """Tunegate's own training step, without DoRA (see `unplanned`)."""
    return Settings(
        method=method,
        length=shape.length,
        batch=shape.batch,
        scored=shape.scored,
        rank=train.rank,
        targets=train.target_modules,
        dropout=train.dropout,
        compute_bytes=compute_bytes,
        double_quant=train.double_quant,
        optimiser=train.optimizer,
        checkpointing=train.activation_checkpointing,
        stack=_stack(method, shape.way),
        segments=shape.segments,
        takes_off_start=method in LORA_ARMS and train.init in ("pissa", "olora"),
        prefix_tokens=train.prefix_tokens if method == "prefix" else 0,
    )


def on_cpu(settings: Settings) -> Settings:
    """A CPU has a node for attention over a packed row, and keeps dropout's noise in fp32."""
    mask = "node" if settings.stack.mask == "segments" else settings.stack.mask
    return replace(settings, stack=replace(settings.stack, noise_bytes=FP32, mask=mask))


def _stack(method: Method, way: Way) -> Stack:
    if method == "prefix":
        return PREFIX_STACK
    return Stack() if way == "packed" else PADDED_STACK


def unplanned(train: TrainSpec, method: Method) -> Problem | None:
    """What of a training step has no formulas here."""
    if method in LORA_ARMS and train.use_dora:
        act = "plan without it, and leave room: DoRA makes each adapted layer's whole weight once more"
        return Problem("DoRA's memory is not planned", "train.use_dora", act=act)
    if train.optimizer not in OPTIMISERS:
        what = f"{train.optimizer}: its states are not known here"
        return Problem(what, "train.optimizer", f"one of {', '.join(OPTIMISERS)}")
    return None


# bitsandbytes 0.50: tensors under 4,096 elements keep 32-bit states, those under 100,000 are never paged.
MIN_8BIT, MIN_PAGED, BLOCK_8BIT = 4096, 100_000, 256
CODE_8BIT = 256 * FP32
"""One table of 256 fp32 levels for each kind of state, shared by all tensors."""

# name: (states, bits). torch's optimisers keep states in the parameter's format: bits 0.
_STATES = {
    "adamw_torch": (2, 0), "adamw_torch_fused": (2, 0), "adamw": (2, 0), "sgd": (0, 0), "adagrad": (1, 0),
    "rmsprop": (1, 0), "adamw_8bit": (2, 8), "adamw_bnb_8bit": (2, 8), "paged_adamw": (2, 32),
    "paged_adamw_32bit": (2, 32), "paged_adamw_8bit": (2, 8), "lion_32bit": (1, 32), "lion_8bit": (1, 8),
    "paged_lion_32bit": (1, 32), "paged_lion_8bit": (1, 8), "rmsprop_bnb": (1, 32), "rmsprop_bnb_8bit": (1, 8),
    "rmsprop_bnb_32bit": (1, 32),
}  # fmt: skip
OPTIMISERS = (*_STATES, "adafactor")


def state_bytes(name: str, shapes: Sequence[tuple[int, int]], parameter_bytes: int) -> tuple[int, int]:
    """(all states, those that may be paged out to host memory) for tensors of these shapes.

    Adafactor keeps a row and a column of each matrix (arXiv 1804.04235). Raises KeyError for a name not in OPTIMISERS.
    """
    if name == "adafactor":
        return sum((rows + columns) * FP32 for rows, columns in shapes), 0
    states, bits = _STATES[name]
    sizes = [rows * columns for rows, columns in shapes]
    if bits == 0:
        return states * parameter_bytes * sum(sizes), 0
    each = [(size, states * (_8bit(size) if bits == 8 else size * FP32)) for size in sizes]
    paged = sum(_pageable(size, states, bits) for size in sizes if size >= MIN_PAGED) if name.startswith("paged") else 0
    tables = states * CODE_8BIT if bits == 8 else 0
    return sum(total for _, total in each) + tables, paged


def _8bit(size: int) -> int:
    """One byte an element and an fp32 scale for each block of 256 (arXiv 2110.02861)."""
    return size * FP32 if size < MIN_8BIT else size + ceil(size / BLOCK_8BIT) * FP32


def _pageable(size: int, states: int, bits: int) -> int:
    return states * size * bits // 8
