"""Attention over a packed prefix tree, segment by segment: no mask of the whole row, no work between sequences.

It is registered with transformers as one more attention implementation, so every architecture that uses its attention
interface has it. Without a `tree` it is SDPA, as in generation. Shapes: B 1, H heads, G heads of keys and values, T
tokens of the row, S of a segment and all that it sees, D head size.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tasks.models.core.packing import MASK_TOKENS, QUERIES, Tree
from tasks.runtime.workers.device import arithmetic

ATTENTION = "prefix_tree"


def tree_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """[B,T,H,D]. options: those of transformers' attention interface, and `tree`, the shape of a packed row.

    Raises NotImplementedError for what it does not compute: softcaps, sinks, windows shorter than a path.
    """
    if options.get("softcap") or options.get("s_aux") is not None:
        raise NotImplementedError("attention with a softcap or sinks")
    tree: Tree | None = options.pop("tree", None)
    if tree is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BHTD, key_BGTD, value_BGTD, attention_mask, **options
        )
        return found
    scaling: float | None = options.get("scaling")
    dropout: float = options.get("dropout", 0.0)
    window = options.get("sliding_window")
    if window and (longest := max(seen for _, seen in tree.seen)) > window:
        raise NotImplementedError(f"a path of {longest} tokens in a window of {window}")
    if query_BHTD.device.type == "cpu" and not dropout:
        apply: Any = CpuAttention.apply
        inputs = (x.to(arithmetic(x)) for x in (query_BHTD, key_BGTD, value_BGTD))
        return apply(*inputs, tree, scaling), None
    return by_sdpa(query_BHTD, key_BGTD, value_BGTD, tree, scaling, dropout), None


def by_sdpa(
    query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, tree: Tree, scaling: float | None,
    dropout: float,
) -> torch.Tensor:  # fmt: skip
    repeats = query_BHTD.shape[1] // key_BGTD.shape[1]
    # Split once and concatenated: slices would each fill a gradient of the whole row.
    keys, values = (repeat_kv(x, repeats).split(tree.node_tokens, dim=2) for x in (key_BGTD, value_BGTD))
    queries = query_BHTD.split([own for own, _ in tree.seen], dim=2)
    pieces = []
    for segment, query in zip(tree.segments, queries, strict=True):
        nodes = (*segment.ancestors, *segment.own)
        key, value = (_joined([x[node] for node in nodes]) for x in (keys, values))
        own, seen = query.shape[2], key.shape[2]
        mask = None
        if own < seen:
            mask = torch.ones(own, seen, dtype=torch.bool, device=query.device).tril(seen - own)
        pieces.append(
            F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()


class CpuAttention(torch.autograd.Function):
    """The same as one autograd node on PyTorch's CPU kernels: keys and values are not copied for each head and segment
    that reads them. The kernels compute all pairs of a call, so it takes a few queries at a time and only the keys that
    the last of them sees."""

    @staticmethod
    def forward(
        ctx: Any, query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, tree: Tree,
        scaling: float | None,
    ) -> torch.Tensor:  # fmt: skip
        out_BTHD = query_BHTD.new_empty(query_BHTD.transpose(1, 2).shape)
        query_GRTD, out_GRTD = (_grouped(x, key_BGTD) for x in (query_BHTD, out_BTHD.transpose(1, 2)))
        log_sum_GRT = torch.empty(query_GRTD.shape[:3])
        for own, nodes in _segments(tree):
            key_G1SD, value_G1SD = (_gathered(x, nodes) for x in (key_BGTD, value_BGTD))
            for block, seen in _blocks(own, key_G1SD.shape[2]):
                inputs = _inputs(query_GRTD[:, :, block], key_G1SD[:, :, :seen], value_G1SD[:, :, :seen])
                found = _FORWARD(*inputs, scale=scaling, **_causality(*inputs))
                out_GRTD[:, :, block], log_sum_GRT[:, :, block] = found
        ctx.tree, ctx.scaling = tree, scaling
        ctx.save_for_backward(query_BHTD, key_BGTD, value_BGTD, out_BTHD, log_sum_GRT)
        return out_BTHD

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHTD, key_BGTD, value_BGTD, out_BTHD, log_sum_GRT = ctx.saved_tensors
        dquery_BHTD, dkey_BGTD, dvalue_BGTD = (torch.zeros_like(x) for x in (query_BHTD, key_BGTD, value_BGTD))
        queries = (query_BHTD, dquery_BHTD, out_BTHD.transpose(1, 2), outer[0].transpose(1, 2))
        query_GRTD, dquery_GRTD, out_GRTD, dout_GRTD = (_grouped(x, key_BGTD) for x in queries)
        for own, nodes in _segments(ctx.tree):
            key_G1SD, value_G1SD = (_gathered(x, nodes) for x in (key_BGTD, value_BGTD))
            dkey_GSD, dvalue_GSD = (torch.zeros_like(x[:, 0]) for x in (key_G1SD, value_G1SD))
            for block, seen in _blocks(own, key_G1SD.shape[2]):
                inputs = _inputs(query_GRTD[:, :, block], key_G1SD[:, :, :seen], value_G1SD[:, :, :seen])
                dout, out, log_sum = (x[:, :, block] for x in (dout_GRTD, out_GRTD, log_sum_GRT))
                dquery_GRTD[:, :, block], dkey_GRSD, dvalue_GRSD = _BACKWARD(
                    dout, *inputs, out, log_sum, 0.0, scale=ctx.scaling, **_causality(*inputs)
                )
                dkey_GSD[:, :seen] += dkey_GRSD.sum(dim=1)
                dvalue_GSD[:, :seen] += dvalue_GRSD.sum(dim=1)
            _scatter(dkey_GSD, dkey_BGTD, nodes)
            _scatter(dvalue_GSD, dvalue_BGTD, nodes)
        return dquery_BHTD, dkey_BGTD, dvalue_BGTD, None, None


_FORWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _segments(tree: Tree) -> Iterator[tuple[range, list[slice]]]:
    """Of each segment: its own tokens, and the slices of the row that it sees."""
    starts = [0]
    for tokens in tree.node_tokens:
        starts.append(starts[-1] + tokens)
    end = 0
    for segment, (own, _) in zip(tree.segments, tree.seen, strict=True):
        end += own
        yield range(end - own, end), [slice(starts[n], starts[n + 1]) for n in (*segment.ancestors, *segment.own)]


def _blocks(own: range, seen: int) -> Iterator[tuple[slice, int]]:
    """Of each block of a segment's queries: its slice of the row, and how many keys its last query sees."""
    for start in own[::QUERIES]:
        stop = min(start + QUERIES, own.stop)
        yield slice(start, stop), seen - (own.stop - stop)


def _grouped(x_BHTD: torch.Tensor, key_BGTD: torch.Tensor) -> torch.Tensor:
    """A view [G,R,T,D]: the heads that read the same keys side by side. There is one packed row."""
    return x_BHTD[0].view(key_BGTD.shape[1], -1, *x_BHTD.shape[2:])


def _gathered(x_BGTD: torch.Tensor, nodes: Sequence[slice]) -> torch.Tensor:
    return _joined([x_BGTD[:, :, node] for node in nodes]).transpose(0, 1)


def _scatter(dx_GSD: torch.Tensor, into_BGTD: torch.Tensor, nodes: Sequence[slice]) -> None:
    """Add what `_gathered` handed out."""
    for node, part in zip(nodes, dx_GSD.split([node.stop - node.start for node in nodes], dim=1), strict=True):
        into_BGTD[0, :, node] += part


def _inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For the kernels, which want as many heads of keys as of queries; none is copied."""
    repeats = query.shape[1]
    return query, key.expand(-1, repeats, -1, -1), value.expand(-1, repeats, -1, -1)


def _causality(query: torch.Tensor, key: torch.Tensor, _: torch.Tensor) -> dict[str, Any]:
    """The last query stands at the last key; each sees the keys up to its own place."""
    own, seen = query.shape[2], key.shape[2]
    if own == seen:
        return {"is_causal": True}
    before = MASK_TOKENS * -(-seen // MASK_TOKENS)
    return {"is_causal": False, "attn_mask": _mask(before, query.dtype)[:own, before - (seen - own) : before + own]}


@lru_cache(maxsize=4)
def _mask(before: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores [block, before + block]: every mask of a step is a part of it."""
    mask = torch.zeros(QUERIES, before + QUERIES, dtype=dtype)
    mask[:, before:] = torch.full((QUERIES, QUERIES), -torch.inf).triu(1)
    return mask


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=2)


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
