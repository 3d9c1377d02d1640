"""Activations and logits at the peak of a training step, from what PyTorch's autograd keeps for each operation.

A frozen linear layer keeps nothing, an adapter keeps its input, a norm keeps its input in fp32, attention keeps q, k, v
and its output, a gated feed-forward part keeps three tensors of its inner width. Bytes everywhere.
"""

from tasks.core.architecture import Architecture
from tasks.core.settings import FP32, Settings


def activation_bytes(arch: Architecture, settings: Settings) -> tuple[int, int, int]:
    """(kept through the forward pass, on top while a block goes backward, left when the last one does).

    With checkpointing a block keeps only its input, and is run again when its turn comes.
    """
    block = settings.tokens * block_bytes_per_token(arch, settings)
    boundary = settings.tokens * arch.hidden * settings.compute_bytes
    final_norm = (
        settings.tokens * arch.hidden * (settings.stack.norm_bytes if arch.rms_norm else settings.compute_bytes)
    )
    gradients = settings.tokens * gradient_bytes_per_token(arch, settings) + dequantised_bytes(arch, settings)
    shared = boundary + cast_adapter_bytes(arch, settings)
    if settings.checkpointing:
        kept = shared + (arch.layers - 1) * boundary + final_norm
        return kept, block + gradients, shared + block + gradients
    return shared + arch.layers * block + final_norm, gradients, shared + block + gradients


def block_bytes_per_token(arch: Architecture, settings: Settings) -> int:
    """What one block keeps for the backward pass, a token."""
    return (
        norm_bytes(arch, settings)
        + attention_bytes(arch, settings)
        + settings.compute_bytes * arch.inner * (3 if arch.gated else 1)
        + input_bytes(arch, settings)
    )


def norm_bytes(arch: Architecture, settings: Settings) -> int:
    """RMSNorm (LlamaRMSNorm) squares an fp32 copy of its input and keeps it; LayerNorm keeps its input."""
    width = arch.norms * arch.hidden
    if arch.qk_norm:
        width += (arch.heads + arch.kv_heads) * arch.head_dim
    kept = settings.stack.norm_bytes if arch.rms_norm else settings.compute_bytes
    kept += settings.compute_bytes if settings.method == "full" and arch.rms_norm else 0
    return width * kept


def attention_bytes(arch: Architecture, settings: Settings) -> int:
    """q, k, v, output, one fp32 log-sum a head (arXiv 2205.14135); with a mask also its row, in the compute format."""
    size, stack = settings.compute_bytes, settings.stack
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    kept = size * (2 * queries + 2 * (keys if stack.mask == "none" else queries)) + FP32 * arch.heads
    if arch.fused_qkv:  # values are a view into the joint projection, which stays whole
        kept += size * (queries + keys)
    if stack.mask != "none":
        kept += size * (settings.tokens if stack.mask == "packed" else settings.length)
    if stack.eager_attention:
        kept += (FP32 + size) * arch.heads * settings.length
    return kept


def input_bytes(arch: Architecture, settings: Settings) -> int:
    """Inputs that linear layers keep: shared ones once, those cast for an adapter or dropped out once each."""
    size, stack = settings.compute_bytes, settings.stack
    own = settings.adapted(arch)
    trained = arch.linears if settings.method == "full" else own
    is_copied = settings.method != "full" and (settings.casts or settings.dropout > 0)
    shared = trained if not is_copied else []
    if settings.is_quantised and stack.quantised_inputs:
        shared = arch.linears
    # Attention keeps its output anyway.
    widths = {linear.reads: linear.inputs for linear in shared if linear.reads != "attention_out"}
    kept = size * sum(widths.values()) + settings.rank * size * len(own)
    if is_copied:
        copy = size if stack.autocast else stack.adapter_bytes
        kept += sum((copy + (1 if settings.dropout > 0 else 0)) * linear.inputs for linear in own)
    if stack.adapter_outputs:
        kept += size * (arch.heads + arch.kv_heads) * arch.head_dim
    return kept


def gradient_bytes_per_token(arch: Architecture, settings: Settings) -> int:
    """Gradients alive at once while a feed-forward part goes backward: inner widths, and two of the block's.

    A gated part makes two of the inner width beside what it keeps; an adapter whose input was cast makes one more.
    """
    widths = (2 if arch.gated else 1) + (1 if settings.casts else 0)
    return settings.compute_bytes * (widths * arch.inner + 2 * arch.hidden)


def dequantised_bytes(arch: Architecture, settings: Settings) -> int:
    """The largest quantised layer in the compute format: it lives for one product (bitsandbytes MatMul4Bit)."""
    if not settings.is_quantised:
        return 0
    return settings.compute_bytes * max(linear.weights for linear in arch.linears)


def cast_adapter_bytes(arch: Architecture, settings: Settings) -> int:
    """Autocast's 16-bit copies of fp32 adapters: it keeps them until the forward pass ends, autograd longer."""
    stack = settings.stack
    if settings.method == "full" or not stack.autocast or stack.adapter_bytes == settings.compute_bytes:
        return 0
    return settings.compute_bytes * sum(rows * columns for rows, columns in settings.trainable(arch))


def logit_bytes(arch: Architecture, settings: Settings) -> int:
    """Vocabulary-wide tensors when the backward pass begins.

    Cross-entropy keeps the log-probabilities; their gradient and the logits' gradient are made beside them: three
    tensors. Chunked and compiled: the logits in the compute format, and for an eighth of the tokens their gradient.
    """
    size = settings.compute_bytes
    scored = settings.tokens if settings.scored is None else settings.scored
    if settings.stack.loss == "chunked":
        each = size * (1 + 1 / 8)
    elif settings.stack.loss == "fp32":
        each = (3 + settings.stack.loss_copies) * FP32
    else:
        each = (3 + settings.stack.loss_copies) * size
    return int(scored * arch.vocab * each)
