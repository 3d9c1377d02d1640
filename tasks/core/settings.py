"""What is trained and with which software: all that memory depends on beside the architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.core.architecture import Architecture, Linear

Method = Literal["lora", "qlora", "full"]
FP32, FP16 = 4, 2


@dataclass(frozen=True)
class Stack:
    """How the training software keeps things. The defaults are Tunegate's: transformers, PEFT, Trainer."""

    adapter_bytes: int = FP32
    """PEFT keeps adapters in fp32 (`autocast_adapter_dtype`); torchtune, litgpt and fsdp_qlora in the base's format."""
    autocast: bool = True
    """Trainer's `bf16=True`: fp32 adapters and their inputs are cast to 16 bit for each product."""
    mask: Literal["packed", "padded", "none"] = "packed"
    """A mask tensor (one for all rows of a packed step, or one a row) is kept by every layer, and makes transformers
    repeat keys and values for every head."""
    eager_attention: bool = False
    """Attention that keeps the scores of every pair of tokens."""
    norm_bytes: int = FP32
    """transformers' RMSNorm keeps its input in fp32; compiled and fused ones keep it in the compute format."""
    loss: Literal["fp32", "compute", "chunked"] = "fp32"
    """Format of the cross-entropy over the vocabulary; `chunked` is torchtune's compiled one, in eight chunks."""
    loss_copies: float = 0.0
    """Further copies of the logits in the loss's format that outlive it, as outputs that the caller holds."""
    quantised_inputs: bool = False
    """bitsandbytes before 0.43 kept the input of every quantised layer, although a frozen one needs none."""
    adapter_outputs: bool = False
    """litgpt's joint q/v adapter keeps its output before padding it."""
    kbit_upcast: bool = False
    """PEFT's `prepare_model_for_kbit_training`: everything that is not quantised becomes fp32. Tunegate leaves it out."""


@dataclass(frozen=True)
class Settings:
    """What is trained, and how. `tokens` in one forward pass, in rows of `length`; `scored` of them have a loss."""

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

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def is_quantised(self) -> bool:
        return self.method == "qlora"

    def adapted(self, arch: Architecture) -> list[Linear]:
        """The linear layers of one block that get an adapter."""
        if self.method == "full":
            return []
        if self.targets == "all-linear":
            return list(arch.linears)
        names = [self.targets] if isinstance(self.targets, str) else self.targets
        return [linear for linear in arch.linears if linear.name in names]

    def trainable(self, arch: Architecture) -> list[tuple[int, int]]:
        """(rows, columns) of every trained tensor: A [rank, inputs] and B [outputs, rank] of each adapted layer."""
        if self.method == "full":
            return [(1, arch.parameters)]
        pairs = [
            shape
            for linear in self.adapted(arch)
            for shape in ((self.rank, linear.inputs), (linear.outputs, self.rank))
        ]
        return pairs * arch.layers

    @property
    def casts(self) -> bool:
        """Adapters have another format than the base's arithmetic, so their inputs are copied."""
        return self.method != "full" and self.stack.adapter_bytes != self.compute_bytes


def settings_of(
    dials: Mapping[str, Any], method: Method, compute_bytes: int, length: int, batch: int = 1, scored: int | None = None
) -> Settings:
    """Tunegate's own training step. dials: those of a TrainSpec, by name. scored: None plans for a loss on all tokens.

    For one packed row of T tokens, as the training worker has at hand: length T, batch 1, scored its completion tokens.
    """
    return Settings(
        method=method,
        length=length,
        batch=batch,
        scored=scored,
        rank=dials["rank"],
        targets=dials["target_modules"],
        dropout=dials["dropout"],
        compute_bytes=compute_bytes,
        optimiser=dials["optimizer"],
        checkpointing=dials["activation_checkpointing"],
    )
