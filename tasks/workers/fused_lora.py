"""LoRA's linear layers as one autograd node each: the low-rank product is added in place, nothing is kept twice.

PEFT computes base(x) + B(A(x)) * scale with a copy of the output for each operation. Here both products accumulate into
one output (addmm), and a 4-bit weight is dequantised once each way. Shapes: N tokens, I in, O out, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer

Weight = Callable[[torch.dtype], torch.Tensor]


class LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scale (x A') B', with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, weight: Weight,
        bias_O: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        low_NR = x_NI @ a_RI.T
        y_NO = F.linear(x_NI, weight(x_NI.dtype), bias_O)
        ctx.save_for_backward(x_NI, a_RI, b_OR, low_NR)
        ctx.scale, ctx.weight = scale, weight
        return y_NO.addmm_(low_NR, b_OR.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy_NO,) = outer
        x_NI, a_RI, b_OR, low_NR = ctx.saved_tensors
        dlow_NR = (dy_NO @ b_OR).mul_(ctx.scale)
        dx_NI = None
        if ctx.needs_input_grad[0]:
            dx_NI = (dy_NO @ ctx.weight(dy_NO.dtype)).addmm_(dlow_NR, a_RI)
        db_OR = (dy_NO.T @ low_NR).mul_(ctx.scale)
        return dx_NI, dlow_NR.T @ x_NI, db_OR, None, None, None


def fuse_lora(model: torch.nn.Module) -> int:
    """Give every plain LoRA linear layer the fused forward; answers with how many got it.

    While dropout is at work, a layer computes as PEFT does.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _is_plain(layer)]
    for layer in layers:
        layer.forward = _forward(layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    """One vanilla adapter on a linear layer, frozen."""
    base = layer.get_base_layer()
    names = list(layer.lora_A)
    return (
        isinstance(base, torch.nn.Linear)
        and not any(parameter.requires_grad for parameter in base.parameters())
        and len(names) == 1
        and not getattr(layer, "lora_variant", {})
        and not getattr(layer, "fan_in_fan_out", False)
        and not layer.lora_bias[names[0]]
    )


def _forward(layer: Any) -> Callable[..., torch.Tensor]:
    (name,) = layer.lora_A
    down, up, scale = layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name])
    dropout, plain, base = layer.lora_dropout[name], layer.forward, layer.get_base_layer()
    weight, bias = _weight(base), base.bias

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        drops = dropout.training and not isinstance(dropout, torch.nn.Identity)
        if drops or layer.disable_adapters or layer.merged or args or kwargs:
            found: torch.Tensor = plain(x, *args, **kwargs)
            return found
        flat = x.reshape(-1, x.shape[-1])
        low_rank = down.weight.to(x.dtype), up.weight.to(x.dtype), scale
        apply: Any = LoraLinear.apply
        y: torch.Tensor = apply(flat, *low_rank, weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward


def _weight(base: Any) -> Weight:
    """The layer's weight [O, I] in the number format asked for."""
    state = getattr(
        base.weight, "quant_state", None
    )  # once: weights that are gathered from several GPUs come without it

    def weight(dtype: torch.dtype) -> torch.Tensor:
        stored: torch.Tensor = base.weight.data
        return (dequantize_4bit(stored, state) if state is not None else stored).to(dtype)

    return weight
