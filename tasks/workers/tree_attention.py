"""Attention over a packed prefix tree, segment by segment: no mask of the whole row, no work between sequences.

It is registered with transformers as one more attention implementation, so every architecture that uses its attention
interface has it. Without a `tree` it is SDPA, as in generation. Shapes: B 1, H heads, T tokens, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tasks.core.packing import Tree

NAME = "prefix_tree"


def tree_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tree: Tree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B,T,H,D]. Raises NotImplementedError for what it does not compute: softcaps, sinks, windows shorter than a path."""
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with a softcap or sinks")
    if tree is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BHTD, key_BHTD, value_BHTD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    repeats = query_BHTD.shape[1] // key_BHTD.shape[1]
    # Split once and concatenated: slices would each fill a gradient of the whole row.
    keys, values = (repeat_kv(x, repeats).split(tree.node_tokens, dim=2) for x in (key_BHTD, value_BHTD))
    queries = query_BHTD.split([sum(tree.node_tokens[n] for n in s.own) for s in tree.segments], dim=2)
    window = kwargs.get("sliding_window")
    pieces = []
    for segment, query in zip(tree.segments, queries, strict=True):
        nodes = (*segment.ancestors, *segment.own)
        key, value = (_joined([x[node] for node in nodes]) for x in (keys, values))
        if window and key.shape[2] > window:
            raise NotImplementedError(f"a path of {key.shape[2]} tokens in a window of {window}")
        pieces.append(_attend(query, key, value, dropout, scaling))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """The last query stands at the last key; each sees the keys up to its own place."""
    own, seen = query.shape[2], key.shape[2]
    mask = None
    if own < seen:
        mask = torch.ones(own, seen, dtype=torch.bool, device=query.device).tril(seen - own)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
