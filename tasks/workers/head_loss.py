"""Losses of scored tokens from their hidden states, through the vocabulary projection, frozen or trained, in chunks.

The logits of a chunk live only until its losses and its gradient are known, so memory does not grow with the tokens
scored (the idea is Liger's, arXiv 2410.10989). Shapes: N scored tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch

from tasks.core.activations import CHUNK_LOGITS


class HeadLoss(torch.autograd.Function):
    """[N] losses in nats of `targets_N`, given hidden_ND and a frozen weight_VD."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        # One buffer for all chunks: fresh memory of this size costs as much as the arithmetic on it.
        logits_CV = _logits_of_a_chunk(hidden_ND, weight_VD, targets_N)
        losses = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for chunk in _chunks(weight_VD, targets_N):
            gradient_CD = None if gradient_ND is None else gradient_ND[chunk]
            losses[chunk] = _chunk(hidden_ND[chunk], weight_VD, targets_N[chunk], logits_CV, gradient_CD)
        ctx.save_for_backward(gradient_ND)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * outer[0][:, None].to(gradient_ND.dtype), None, None


class TrainedHeadLoss(torch.autograd.Function):
    """The same with a gradient for weight_VD, where what comes from above has to be known first: logits are made twice.

    hidden_ND and weight_VD in one format; the weight's gradient is summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        logits_CV = _logits_of_a_chunk(hidden_ND, weight_VD, targets_N)
        chunks = _chunks(weight_VD, targets_N)
        pieces = [_chunk(hidden_ND[c], weight_VD, targets_N[c], logits_CV, None) for c in chunks]
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        dhidden_ND = torch.empty_like(hidden_ND)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for c in _chunks(weight_VD, targets_N):
            slopes_CV = _slopes(hidden_ND[c], weight_VD, targets_N[c, None]).mul_(outer[0][c, None])
            dhidden_ND[c] = slopes_CV.to(weight_VD.dtype) @ weight_VD
            dweight_VD += slopes_CV.to(weight_VD.dtype).T @ hidden_ND[c]
        return dhidden_ND, dweight_VD.to(weight_VD.dtype), None


def _chunks(weight_VD: torch.Tensor, targets_N: torch.Tensor) -> Iterator[slice]:
    rows = _rows(weight_VD)
    return (slice(start, start + rows) for start in range(0, len(targets_N), rows))


def _logits_of_a_chunk(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return hidden_ND.new_empty(min(_rows(weight_VD), len(targets_N)), len(weight_VD))


def _rows(weight_VD: torch.Tensor) -> int:
    return max(1, CHUNK_LOGITS // len(weight_VD))


def _slopes(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, targets_C1: torch.Tensor) -> torch.Tensor:
    """d loss / d logits [C,V] in fp32: softmax - one-hot."""
    probabilities = (hidden_CD @ weight_VD.T).float().softmax(dim=-1)
    return probabilities.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1, dtype=torch.float32))


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
