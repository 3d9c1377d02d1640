"""A gated feed-forward part with LoRA on its three layers as one autograd node: half of its activations are not kept.

Kept: the input, the gate and the other branch before they meet, and the low-rank products. What `down` reads is computed
again from them on the way back, element by element (the idea is Unsloth's). Shapes as in fused_lora.py; M inner width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import SiLUActivation

from tasks.models.workers.fused_layers import Lora, drops, lora_of, product, product_backward

_PARTS = ("gate_proj", "up_proj", "down_proj")
_silu_backward: Any = torch.ops.aten.silu_backward.grad_input


class LoraMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with gradients for x and the six low-rank matrices."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, layers: list[Lora], *low_rank: torch.Tensor) -> torch.Tensor:
        (gate, up, down), (ga, gb, ua, ub, da, db) = layers, low_rank
        gate_NM, gate_low = product(x_NI, ga, gb, gate)
        up_NM, up_low = product(x_NI, ua, ub, up)
        y_NO, down_low = product(F.silu(gate_NM).mul_(up_NM), da, db, down)
        ctx.save_for_backward(x_NI, gate_NM, up_NM, gate_low, up_low, down_low, *low_rank)
        ctx.layers = layers
        return y_NO

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        (dy_NO,) = outer
        x_NI, gate_NM, up_NM, gate_low, up_low, down_low, ga, gb, ua, ub, da, db = ctx.saved_tensors
        gate, up, down = ctx.layers
        silu_NM = F.silu(gate_NM)
        dinner_NM, dda, ddb = product_backward(dy_NO, silu_NM * up_NM, down_low, da, db, down, True)
        assert dinner_NM is not None
        dup_NM = silu_NM.mul_(dinner_NM)
        dgate_NM = _silu_backward(dinner_NM.mul_(up_NM), gate_NM, grad_input=dinner_NM)
        del silu_NM
        wanted = ctx.needs_input_grad[0]
        dx_NI, dua, dub = product_backward(dup_NM, x_NI, up_low, ua, ub, up, wanted)
        more_NI, dga, dgb = product_backward(dgate_NM, x_NI, gate_low, ga, gb, gate, wanted)
        if dx_NI is not None and more_NI is not None:
            dx_NI.add_(more_NI)
        return dx_NI, None, dga, dgb, dua, dub, dda, ddb


def fuse_mlp(model: torch.nn.Module) -> int:
    """Give every feed-forward part of this shape the fused forward; answers with how many got it.

    A part of another shape, or one whose class computes something else with the same names, stays as it is.
    """
    parts = [part for part in model.modules() if _has_shape(part) and _computes_the_same(part)]
    for part in parts:
        part.forward = _forward(part)
    return len(parts)


def _has_shape(part: Any) -> bool:
    layers = [getattr(part, name, None) for name in _PARTS]
    is_silu = isinstance(getattr(part, "act_fn", None), (torch.nn.SiLU, SiLUActivation))
    return is_silu and all(layer is not None and lora_of(layer) is not None for layer in layers)


def _computes_the_same(part: Any) -> bool:
    """On a few numbers, which is how a class that scales or norms in between is told apart."""
    weight = part.gate_proj.lora_A[next(iter(part.gate_proj.lora_A))].weight
    dtype = next(part.gate_proj.get_base_layer().parameters()).dtype
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).view(2, -1)
    x = x.to(dtype if dtype.is_floating_point else weight.dtype)
    with torch.no_grad():
        return torch.allclose(part.forward(x), _forward(part)(x), rtol=1e-2, atol=1e-4)


def _forward(part: Any) -> Callable[..., torch.Tensor]:
    plain = part.forward
    layers = [getattr(part, name) for name in _PARTS]
    parameters = [lora for layer in layers if (lora := lora_of(layer)) is not None]

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or any(drops(layer) for layer in layers):
            found: torch.Tensor = plain(x, *args, **kwargs)
            return found
        low_rank = [matrix for lora in parameters for matrix in lora.matrices(x.dtype)]
        apply: Any = LoraMlp.apply
        y: torch.Tensor = apply(x.reshape(-1, x.shape[-1]), parameters, *low_rank)
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward
