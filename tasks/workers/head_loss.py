"""Losses of scored tokens from their hidden states, through a frozen vocabulary projection, in chunks.

The logits of a chunk live only until its losses and its gradient are known, so memory does not grow with the tokens
scored (the idea is Liger's, arXiv 2410.10989). Shapes: N scored tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch

from tasks.core.activations import CHUNK_LOGITS


class HeadLoss(torch.autograd.Function):
    """[N] losses in nats of `targets_N`, given hidden_ND and weight_VD, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        rows = max(1, CHUNK_LOGITS // len(weight_VD))
        # One buffer for all chunks: fresh memory of this size costs as much as the arithmetic on it.
        logits_CV = hidden_ND.new_empty(min(rows, len(targets_N)), len(weight_VD))
        losses = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets_N), rows):
            chunk = slice(start, start + rows)
            gradient_CD = None if gradient_ND is None else gradient_ND[chunk]
            losses[chunk] = _chunk(hidden_ND[chunk], weight_VD, targets_N[chunk], logits_CV, gradient_CD)
        ctx.save_for_backward(gradient_ND)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * outer[0][:, None].to(gradient_ND.dtype), None, None


def _chunk(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, targets_C: torch.Tensor, buffer_CV: torch.Tensor,
    gradient_CD: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Losses [C] in fp32; their gradient is written to `gradient_CD`.

    d loss / d hidden = (softmax - one-hot) W. It is divided by the softmax's sum after the product, D wide and no longer V.
    """
    product = torch.mm(hidden_CD, weight_VD.T, out=buffer_CV[: len(hidden_CD)])
    target_C1 = product.gather(1, targets_C[:, None]).float()
    highest_C1 = product.amax(dim=-1, keepdim=True).float()
    exponentials = product.float().sub_(highest_C1).exp_()
    sum_C1 = exponentials.sum(dim=-1, keepdim=True)
    losses = (sum_C1.log() + highest_C1 - target_C1)[:, 0]
    if gradient_CD is not None:
        exponentials.scatter_add_(1, targets_C[:, None], -sum_C1)
        gradient_CD.copy_((exponentials.to(weight_VD.dtype) @ weight_VD).float().div_(sum_C1))
    return losses
