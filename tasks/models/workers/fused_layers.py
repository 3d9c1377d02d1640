"""LoRA's linear layers as one autograd node each: the low-rank product is added in place, nothing is kept twice.

PEFT computes base(x) + B(A(x)) * scale with a copy of the output for each operation. Here both products accumulate into
one output (addmm), and a 4-bit weight is dequantised once each way. Shapes: N tokens, I in, O out, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from tasks.models.workers.loading import dequantised


@dataclass(frozen=True)
class Lora:
    """One adapted linear layer: a frozen base, and the adapter's two matrices on it."""

    base: Any  # torch.nn.Linear, 4-bit ones too
    quant_state: Any  # taken once: weights that are gathered from several GPUs come without it
    down: Any
    up: Any
    scale: float

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I] in the number format asked for."""
        return dequantised(self.base.weight, self.quant_state).to(dtype)

    def matrices(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, I] and B [O, R]; read at each use, for loading an adapter may replace them."""
        a_RI, b_OR = self.down.weight, self.up.weight
        if hasattr(self.base, "start_A"):
            a_RI, b_OR = torch.cat([a_RI, self.base.start_A]), torch.cat([b_OR, -self.base.start_B], dim=1)
        return a_RI.to(dtype), b_OR.to(dtype)


def product(
    x_NI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, lora: Lora
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x W' + bias + scale (x A') B', and x A'."""
    low_NR = x_NI @ a_RI.T
    y_NO = F.linear(x_NI, lora.weight(x_NI.dtype), lora.base.bias)
    return y_NO.addmm_(low_NR, b_OR.T, alpha=lora.scale), low_NR


def product_backward(
    dy_NO: torch.Tensor, x_NI: torch.Tensor, low_NR: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, lora: Lora,
    wants_dx: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x (if it is wanted), A and B."""
    dlow_NR = (dy_NO @ b_OR).mul_(lora.scale)
    dx_NI = (dy_NO @ lora.weight(dy_NO.dtype)).addmm_(dlow_NR, a_RI) if wants_dx else None
    return dx_NI, dlow_NR.T @ x_NI, (dy_NO.T @ low_NR).mul_(lora.scale)


class LoraLinear(torch.autograd.Function):
    """One layer, with gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, lora: Lora) -> torch.Tensor:
        y_NO, low_NR = product(x_NI, a_RI, b_OR, lora)
        ctx.save_for_backward(x_NI, low_NR, a_RI, b_OR)
        ctx.lora = lora
        return y_NO

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, low_NR, a_RI, b_OR = ctx.saved_tensors
        return *product_backward(outer[0], x_NI, low_NR, a_RI, b_OR, ctx.lora, ctx.needs_input_grad[0]), None


def fuse_lora(model: torch.nn.Module) -> int:
    """Give every plain LoRA linear layer the fused forward; answers with how many got it.

    While dropout is at work, a layer computes as PEFT does; with DoRA always. A start that is taken off
    (tasks/models/workers/lora_init.py) is one more part of A and B, which gets no gradient.
    """
    found = [(layer, lora_of(layer)) for layer in model.modules()]
    plain = [(layer, lora) for layer, lora in found if lora is not None]
    for layer, lora in plain:
        layer.forward = _forward(layer, lora)
    return len(plain)


def lora_of(layer: Any) -> Lora | None:
    """The layer's parts if it is linear, frozen, and has one vanilla adapter."""
    if not isinstance(layer, LoraLayer):
        return None
    base, names = layer.get_base_layer(), list(layer.lora_A)
    is_plain = (
        isinstance(base, torch.nn.Linear)
        and not any(parameter.requires_grad for parameter in base.parameters())
        and len(names) == 1
        and not getattr(layer, "lora_variant", {})
        and not getattr(layer, "fan_in_fan_out", False)
        and not layer.lora_bias[names[0]]
    )
    if not is_plain:
        return None
    (name,) = names
    state = getattr(base.weight, "quant_state", None)
    return Lora(base, state, layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name]))


def drops(layer: Any) -> bool:
    """Whether the layer has something to do now that the fused forward leaves out."""
    (dropout,) = layer.lora_dropout.values()
    is_dropping = dropout.training and not isinstance(dropout, torch.nn.Identity)
    return bool(is_dropping or layer.disable_adapters or layer.merged)


def _forward(layer: Any, lora: Lora) -> Callable[..., torch.Tensor]:
    plain = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or drops(layer):
            found: torch.Tensor = plain(x, *args, **kwargs)
            return found
        apply: Any = LoraLinear.apply
        y: torch.Tensor = apply(x.reshape(-1, x.shape[-1]), *lora.matrices(x.dtype), lora)
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward
