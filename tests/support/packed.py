"""What tokens of a packed tree see, worked out without the code under test."""

import numpy as np


def attention_mask_TT(packed):
    """True where token i may look at token j, as the segments say it."""
    edges = np.concatenate([[0], np.cumsum(packed.tree.node_tokens)])
    tokens = [range(edges[node], edges[node + 1]) for node in range(len(packed.tree.node_tokens))]
    mask = np.zeros((len(packed.input_ids_T),) * 2, bool)
    for own, ancestors in packed.tree.segments:
        seen = [t for node in ancestors for t in tokens[node]]
        for token in [t for node in own for t in tokens[node]]:
            seen.append(token)
            mask[token, seen] = True
    return mask
