"""Bytes of an optimiser's states, by transformers' `optim` names."""

from collections.abc import Sequence
from math import ceil

FP32 = 4
# bitsandbytes 0.50: tensors under 4,096 elements keep 32-bit states, those under 100,000 are never paged.
MIN_8BIT, MIN_PAGED, BLOCK_8BIT = 4096, 100_000, 256
CODE_8BIT = 256 * FP32
"""One table of 256 fp32 levels for each kind of state, shared by all tensors."""

# name: (states, bits). torch's optimisers keep states in the parameter's format: bits 0.
_STATES = {
    "adamw_torch": (2, 0), "adamw_torch_fused": (2, 0), "adamw": (2, 0), "sgd": (0, 0), "adagrad": (1, 0),
    "rmsprop": (1, 0), "adamw_8bit": (2, 8), "adamw_bnb_8bit": (2, 8), "paged_adamw": (2, 32),
    "paged_adamw_32bit": (2, 32), "paged_adamw_8bit": (2, 8), "lion_32bit": (1, 32), "lion_8bit": (1, 8),
    "paged_lion_32bit": (1, 32), "paged_lion_8bit": (1, 8), "rmsprop_bnb": (1, 32), "rmsprop_bnb_8bit": (1, 8),
    "rmsprop_bnb_32bit": (1, 32),
}  # fmt: skip
NAMES = (*_STATES, "adafactor")


def state_bytes(name: str, shapes: Sequence[tuple[int, int]], parameter_bytes: int) -> tuple[int, int]:
    """(all states, those that may be paged out to host memory) for tensors of these shapes.

    Adafactor keeps a row and a column of each matrix (arXiv 1804.04235). Raises KeyError for a name not in NAMES.
    """
    if name == "adafactor":
        return sum((rows + columns) * FP32 for rows, columns in shapes), 0
    states, bits = _STATES[name]
    sizes = [rows * columns for rows, columns in shapes]
    if bits == 0:
        return states * parameter_bytes * sum(sizes), 0
    each = [(size, states * (_8bit(size) if bits == 8 else size * FP32)) for size in sizes]
    paged = sum(_pageable(size, states, bits) for size in sizes if size >= MIN_PAGED) if name.startswith("paged") else 0
    tables = states * CODE_8BIT if bits == 8 else 0
    return sum(total for _, total in each) + tables, paged


def _8bit(size: int) -> int:
    """One byte an element and an fp32 scale for each block of 256 (arXiv 2110.02861)."""
    return size * FP32 if size < MIN_8BIT else size + ceil(size / BLOCK_8BIT) * FP32


def _pageable(size: int, states: int, bits: int) -> int:
    return states * size * bits // 8
