"""LoRA's linear layers as one autograd node each: the low-rank product is added in place, nothing is kept twice.

PEFT computes base(x) + B(A(x)) * scale with a copy of the output for each operation. Here both products accumulate into
one output (addmm), and a 4-bit weight is dequantised once each way. Shapes: N tokens, I in, O out, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from transformers.activations import SiLUActivation

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


class Product(NamedTuple):
    """What the backward pass needs of one `product`. low_NR: x A'."""

    x_NI: torch.Tensor
    low_NR: torch.Tensor
    a_RI: torch.Tensor
    b_OR: torch.Tensor
    lora: Lora


def product_backward(
    dy_NO: torch.Tensor, kept: Product, *, wants_dx: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of x (if it is wanted), A and B."""
    x_NI, low_NR, a_RI, b_OR, lora = kept
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
        kept = Product(x_NI, low_NR, a_RI, b_OR, ctx.lora)
        return *product_backward(outer[0], kept, wants_dx=ctx.needs_input_grad[0]), None


def fuse_lora(model: torch.nn.Module) -> int:
    """Give every plain LoRA linear layer the fused forward; answers with how many got it.

    While dropout is active, a layer computes as PEFT does; with DoRA always. A start that is taken off
    (tasks/models/workers/pissa_olora_loftq.py) is one more part of A and B, which gets no gradient.
    """
    found = [(layer, lora_of(layer)) for layer in model.modules()]
    plain = [(layer, lora) for layer, lora in found if lora is not None]
    for layer, lora in plain:
        layer.forward = _lora_forward(layer, lora)
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


def _lora_forward(layer: Any, lora: Lora) -> Callable[..., torch.Tensor]:
    plain = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or drops(layer):
            found: torch.Tensor = plain(x, *args, **kwargs)
            return found
        apply: Any = LoraLinear.apply
        y: torch.Tensor = apply(x.reshape(-1, x.shape[-1]), *lora.matrices(x.dtype), lora)
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward


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
        dinner_NM, dda, ddb = product_backward(dy_NO, Product(silu_NM * up_NM, down_low, da, db, down), wants_dx=True)
        assert dinner_NM is not None
        dup_NM = silu_NM.mul_(dinner_NM)
        dgate_NM = _silu_backward(dinner_NM.mul_(up_NM), gate_NM, grad_input=dinner_NM)
        del silu_NM
        wanted = ctx.needs_input_grad[0]
        dx_NI, dua, dub = product_backward(dup_NM, Product(x_NI, up_low, ua, ub, up), wants_dx=wanted)
        more_NI, dga, dgb = product_backward(dgate_NM, Product(x_NI, gate_low, ga, gb, gate), wants_dx=wanted)
        if dx_NI is not None and more_NI is not None:
            dx_NI.add_(more_NI)
        return dx_NI, None, dga, dgb, dua, dub, dda, ddb


def fuse_mlp(model: torch.nn.Module) -> int:
    """Give every feed-forward part of this shape the fused forward; answers with how many got it.

    A part of another shape, or one whose class computes something else with the same names, stays as it is.
    """
    parts = [part for part in model.modules() if _is_gated_mlp(part) and _computes_the_same(part)]
    for part in parts:
        part.forward = _mlp_forward(part)
    return len(parts)


def _is_gated_mlp(part: Any) -> bool:
    layers = [getattr(part, name, None) for name in _PARTS]
    is_silu = isinstance(getattr(part, "act_fn", None), (torch.nn.SiLU, SiLUActivation))
    return is_silu and all(layer is not None and lora_of(layer) is not None for layer in layers)


def _computes_the_same(part: Any) -> bool:
    """Numeric check on a small input: detects classes that also scale or normalise."""
    weight = part.gate_proj.lora_A[next(iter(part.gate_proj.lora_A))].weight
    dtype = next(part.gate_proj.get_base_layer().parameters()).dtype
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).view(2, -1)
    x = x.to(dtype if dtype.is_floating_point else weight.dtype)
    with torch.no_grad():
        return torch.allclose(part.forward(x), _mlp_forward(part)(x), rtol=1e-2, atol=1e-4)


def _mlp_forward(part: Any) -> Callable[..., torch.Tensor]:
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


class RmsNorm(torch.autograd.Function):
    """x * scale / root mean square of x, with a gradient for x."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, scale_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        length_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_N1 = length_N1.square_().div_(x_ND.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_ND, scale_D, inverse_N1)
        y_ND: torch.Tensor = (x_ND * inverse_N1).mul_(scale_D)
        return y_ND.to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x_ND, scale_D, inverse_N1 = ctx.saved_tensors
        slope_ND = (outer[0] * scale_D).float()
        share_N1 = (slope_ND * x_ND).sum(dim=-1, keepdim=True).mul_(inverse_N1.pow(3)).div_(x_ND.shape[-1])
        return slope_ND.mul_(inverse_N1).addcmul_(x_ND, share_N1, value=-1).to(x_ND.dtype), None, None


def fuse_norms(model: torch.nn.Module) -> int:
    """Give every frozen RMSNorm the fused forward; answers with how many got it.

    Gemma's adds one to its weight. A class that computes something else stays as it is.
    """
    found = [(norm, more) for norm in model.modules() if _is_rms_norm(norm) for more in (0, 1) if _computes(norm, more)]
    for norm, more in found:
        norm.forward = _norm_forward(norm, more)
    return len(found)


def _is_rms_norm(norm: Any) -> bool:
    weight = getattr(norm, "weight", None)
    is_plain = isinstance(weight, torch.Tensor) and weight.ndim == 1 and not weight.requires_grad
    return is_plain and type(norm).__name__.endswith("RMSNorm") and _epsilon(norm) is not None


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)


def _computes(norm: Any, more: int) -> bool:
    """On a few numbers, the same as the node with `more` added to the weight."""
    x = torch.linspace(-1, 2, 2 * len(norm.weight), device=norm.weight.device).view(2, -1).to(norm.weight.dtype)
    with torch.no_grad():
        return torch.allclose(norm.forward(x), _norm_forward(norm, more)(x), rtol=1e-2, atol=1e-4)


def _norm_forward(norm: Any, more: int) -> Callable[[torch.Tensor], torch.Tensor]:
    apply: Any = RmsNorm.apply

    def forward(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = apply(x, norm.weight.float() + more, _epsilon(norm))
        return found

    return forward
