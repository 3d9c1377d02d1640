"""Losses of scored tokens from their hidden states, through the vocabulary projection, frozen or trained, in blocks.

The logits of a block live only until its part of the softmax and of the gradient is known: memory does not grow with
the tokens scored (the idea is Liger's, arXiv 2410.10989) or the vocabulary (the softmax is FlashAttention's, arXiv
2205.14135), and a block stays in the processor's cache. Shapes: N scored tokens, C of them at a time, D hidden size, V
vocabulary, K columns of it at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch

from tasks.models.core.packing import BLOCK_COLUMNS, BLOCK_ROWS


class HeadLoss(torch.autograd.Function):
    """[N] losses in nats of `targets_N`, given hidden_ND and a frozen weight_VD."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
        for rows in _rows(targets_N):
            log_sum_C1, mean_CD = _softmax(hidden_ND[rows], weight_VD, wants_mean=gradient_ND is not None)
            target_CD = weight_VD[targets_N[rows]]
            losses_N[rows] = _losses(hidden_ND[rows], target_CD, log_sum_C1)
            if gradient_ND is not None and mean_CD is not None:
                gradient_ND[rows] = mean_CD.sub_(target_CD)
        ctx.save_for_backward(gradient_ND)
        return losses_N

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
        log_sum_N1 = torch.cat([_softmax(hidden_ND[rows], weight_VD, wants_mean=False)[0] for rows in _rows(targets_N)])
        losses_N = [_losses(hidden_ND[rows], weight_VD[targets_N[rows]], log_sum_N1[rows]) for rows in _rows(targets_N)]
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, log_sum_N1)
        return torch.cat(losses_N)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_ND, weight_VD, targets_N, log_sum_N1 = ctx.saved_tensors
        dhidden_ND = torch.empty_like(hidden_ND)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for rows in _rows(targets_N):
            hidden_CD, targets_C, outer_C1 = hidden_ND[rows], targets_N[rows], outer[0][rows, None]
            dhidden_CD = torch.zeros_like(hidden_CD, dtype=torch.float32)
            for weight_KD, dweight_KD in zip(
                weight_VD.split(BLOCK_COLUMNS), dweight_VD.split(BLOCK_COLUMNS), strict=True
            ):
                probabilities_CK = (hidden_CD @ weight_KD.T).float().sub_(log_sum_N1[rows]).exp_()
                slopes_CK = probabilities_CK.mul_(outer_C1).to(weight_VD.dtype)
                dhidden_CD += slopes_CK @ weight_KD
                dweight_KD += slopes_CK.T @ hidden_CD
            dhidden_ND[rows] = dhidden_CD.sub_(weight_VD[targets_C] * outer_C1)
            dweight_VD.index_add_(0, targets_C, -(hidden_CD * outer_C1).float())
        return dhidden_ND, dweight_VD.to(weight_VD.dtype), None


def _rows(targets_N: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, len(targets_N), BLOCK_ROWS))


def _losses(hidden_CD: torch.Tensor, target_CD: torch.Tensor, log_sum_C1: torch.Tensor) -> torch.Tensor:
    return log_sum_C1[:, 0] - (hidden_CD.float() * target_CD).sum(dim=-1)


def _softmax(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, *, wants_mean: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logarithm of the sum of all logits' exponentials [C,1], and the mean of the weights under softmax, in fp32.

    That mean less the target's weights is d loss / d hidden. Sums are kept relative to the highest logit so far.
    """
    rows = len(hidden_CD)
    highest_C1 = torch.full((rows, 1), -torch.inf, dtype=torch.float32, device=hidden_CD.device)
    sum_C1 = torch.zeros_like(highest_C1)
    mean_CD = torch.zeros_like(hidden_CD, dtype=torch.float32) if wants_mean else None
    # One buffer for all blocks: fresh memory of this size costs as much as the arithmetic on it.
    buffer = hidden_CD.new_empty(rows * min(BLOCK_COLUMNS, len(weight_VD)))
    for weight_KD in weight_VD.split(BLOCK_COLUMNS):
        block_CK = buffer[: rows * len(weight_KD)].view(rows, -1)
        logits_CK = torch.mm(hidden_CD, weight_KD.T, out=block_CK).float()
        before_C1, highest_C1 = highest_C1, torch.maximum(highest_C1, logits_CK.amax(dim=-1, keepdim=True))
        shrink_C1 = before_C1.sub_(highest_C1).exp_()
        exponentials_CK = logits_CK.sub_(highest_C1).exp_()
        sum_C1 = sum_C1.mul_(shrink_C1).add_(exponentials_CK.sum(dim=-1, keepdim=True))
        if mean_CD is not None:
            mean_CD.mul_(shrink_C1).add_(exponentials_CK.to(weight_KD.dtype) @ weight_KD)
    return sum_C1.log().add_(highest_C1), mean_CD.div_(sum_C1) if mean_CD is not None else None
