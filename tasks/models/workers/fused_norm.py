"""RMSNorm with a frozen weight as one autograd node, computed in fp32 without the copies that transformers makes.

Kept: the input as it came, and one number a token. Shapes: N tokens, D width, one leading dimension or several.
"""

from collections.abc import Callable
from typing import Any

import torch


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
    found = [(norm, more) for norm in model.modules() if _has_shape(norm) for more in (0, 1) if _computes(norm, more)]
    for norm, more in found:
        norm.forward = _forward(norm, more)
    return len(found)


def _has_shape(norm: Any) -> bool:
    weight = getattr(norm, "weight", None)
    is_plain = isinstance(weight, torch.Tensor) and weight.ndim == 1 and not weight.requires_grad
    return is_plain and type(norm).__name__.endswith("RMSNorm") and _epsilon(norm) is not None


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)


def _computes(norm: Any, more: int) -> bool:
    """On a few numbers, the same as the node with `more` added to the weight."""
    x = torch.linspace(-1, 2, 2 * len(norm.weight), device=norm.weight.device).view(2, -1).to(norm.weight.dtype)
    with torch.no_grad():
        return torch.allclose(norm.forward(x), _forward(norm, more)(x), rtol=1e-2, atol=1e-4)


def _forward(norm: Any, more: int) -> Callable[[torch.Tensor], torch.Tensor]:
    apply: Any = RmsNorm.apply

    def forward(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = apply(x, norm.weight.float() + more, _epsilon(norm))
        return found

    return forward
