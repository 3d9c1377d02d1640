"""Activations and logits at the moments that can be the peak of a training step, from what PyTorch's autograd keeps.

A frozen linear layer keeps nothing, an adapter keeps its input, a norm keeps its input in fp32, attention keeps q, k, v
and its output, a gated feed-forward part keeps three tensors of its inner width, two if it is one node. Bytes
everywhere.
"""

from typing import Literal

from tasks.models.core.packing import BLOCK_COLUMNS, BLOCK_ROWS, MASK_TOKENS, QUERIES
from tasks.training.core.architecture import Architecture
from tasks.training.core.memory_settings import FP32, Settings

Moment = Literal["loss", "final norm backward", "first block backward", "last block backward"]
Alive = dict[Moment, tuple[int, int]]
"""(activations, logits) at each moment."""
NORM_BACKWARD = 2
"""fp32 tensors of its input's size that an RMSNorm makes while it goes backward
(tasks/models/workers/fused_layers.py)."""


def alive(arch: Architecture, settings: Settings) -> Alive:
    """What is alive at each moment. With checkpointing a block keeps only its input, and is run again at its turn."""
    return _alive_fused(arch, settings) if settings.is_fused else _alive(arch, settings)


def _alive_fused(arch: Architecture, settings: Settings) -> Alive:
    """Tunegate's step, counted to the tensor: the embedding needs no gradient, and the final norm's input goes
    first."""
    size, tokens = settings.compute_bytes, settings.tokens
    block, residual = block_bytes(arch, settings), tokens * arch.hidden * size
    norm_input = tokens * arch.hidden * norm_format(arch, settings)
    shared = 2 * tokens * arch.head_dim * size + mask_bytes(settings)  # the rotary angles' cosines and sines
    casts = cast_adapter_bytes(arch, settings)
    going = residual + gradient_bytes(arch, settings) + casts // arch.layers
    if settings.checkpointing:
        inputs = shared + arch.layers * residual
        again = block - (norm_input if norm_format(arch, settings) == size else 0)  # else the first norm keeps a copy
        kept, first, last = inputs + norm_input, inputs + again + going, shared + residual + again + going
    else:
        blocks = arch.layers * block - norm_input  # the first one's norm keeps nothing
        kept = shared + blocks + casts + norm_input
        first, last = kept - norm_input + going, shared + block - norm_input + going
    norm_backward = NORM_BACKWARD * tokens * arch.hidden * FP32 if arch.rms_norm else 2 * residual
    return {
        "loss": (kept, logit_bytes(arch, settings)), "final norm backward": (kept + norm_backward, 0),
        "first block backward": (first, 0), "last block backward": (last, 0),
    }  # fmt: skip


def _alive(arch: Architecture, settings: Settings) -> Alive:
    """Other programs, and adapters with dropout: ends of the model counted through the whole backward pass."""
    block = block_bytes(arch, settings)
    boundary = settings.tokens * arch.hidden * settings.compute_bytes
    final_norm = settings.tokens * arch.hidden * norm_format(arch, settings)
    gradients = gradient_bytes(arch, settings) + 2 * boundary
    shared = boundary + cast_adapter_bytes(arch, settings) + mask_bytes(settings)
    through = (arch.layers - 1) * boundary if settings.checkpointing else arch.layers * block
    kept = shared + through + final_norm
    first = kept + gradients + (block if settings.checkpointing else 0)
    return {
        "loss": (kept, logit_bytes(arch, settings)), "first block backward": (first, 0),
        "last block backward": (shared + block + gradients, 0),
    }  # fmt: skip


# --- one block ----------------------------------------------------------------------------------------------


def block_bytes(arch: Architecture, settings: Settings) -> int:
    """What one block keeps for the backward pass."""
    tensors = (2 if settings.is_mlp_fused(arch) else 3) if arch.gated else 1
    inner = settings.compute_bytes * arch.inner * tensors
    each = norm_bytes(arch, settings) + inner + input_bytes(arch, settings)
    return settings.tokens * each + attention_bytes(arch, settings)


def norm_format(arch: Architecture, settings: Settings) -> int:
    """transformers' RMSNorm squares an fp32 copy of its input and keeps it; LayerNorm and our node keep the input."""
    is_copied = arch.rms_norm and not settings.norms_are_fused
    return settings.stack.norm_bytes if is_copied else settings.compute_bytes


def norm_bytes(arch: Architecture, settings: Settings) -> int:
    """Inputs of a block's norms, a token."""
    width = arch.norms * arch.hidden
    if arch.qk_norm:
        width += (arch.heads + arch.kv_heads) * arch.head_dim
    trained = settings.compute_bytes if settings.method == "full" and arch.rms_norm else 0
    return width * (norm_format(arch, settings) + trained)


def attention_bytes(arch: Architecture, settings: Settings) -> int:
    """q, k, v, output, one fp32 log-sum a head (arXiv 2205.14135); with a mask also that, in the compute format.

    As one node all layers share one mask.
    """
    size, stack, tokens = settings.compute_bytes, settings.stack, settings.tokens
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    kept = tokens * (2 * size * queries + FP32 * arch.heads)
    if stack.mask == "segments":
        kept += size * (2 * queries * settings.attended + settings.mask_cells)
    elif stack.mask == "padded":
        kept += size * tokens * (2 * queries + settings.length)
    else:
        kept += size * tokens * 2 * keys
    if arch.fused_qkv and stack.mask != "segments":  # values are a view into the joint projection, which stays whole
        kept += tokens * size * (queries + keys)
    if stack.eager_attention:
        scores = FP32 + (size if size != FP32 else 0) + (size if arch.softcap else 0)
        kept += tokens * scores * arch.heads * settings.length
    return kept


def mask_bytes(settings: Settings) -> int:
    """Of the one that all layers share."""
    if settings.stack.mask != "node":
        return 0
    longest = max(seen for _, seen in settings.segments or ((0, settings.length),))
    return settings.compute_bytes * QUERIES * (QUERIES + MASK_TOKENS * -(-longest // MASK_TOKENS))


def input_bytes(arch: Architecture, settings: Settings) -> int:
    """Inputs that linear layers keep, a token: shared ones once, those cast for an adapter or dropped out once each."""
    size, stack = settings.compute_bytes, settings.stack
    own = settings.adapted(arch)
    trained = arch.linears if settings.method == "full" else own
    is_copied = settings.has_lora and (settings.casts or settings.dropout > 0)
    shared = trained if not is_copied else []
    if settings.is_quantised and stack.quantised_inputs:
        shared = arch.linears
    # Attention keeps its output anyway; of segments the output is put together, and that copy is the next one's input.
    widths = {linear.reads: linear.inputs for linear in shared}
    if stack.mask != "segments":
        widths.pop("attention_out", None)
    if settings.is_mlp_fused(arch):
        widths.pop("mlp_out")
    kept = size * sum(widths.values()) + settings.computed_rank * size * len(own)
    if is_copied:
        copy = size if stack.autocast else stack.adapter_bytes
        kept += sum((copy + (stack.noise_bytes if settings.dropout > 0 else 0)) * linear.inputs for linear in own)
    if stack.adapter_outputs:
        kept += size * (arch.heads + arch.kv_heads) * arch.head_dim
    return kept


def gradient_bytes(arch: Architecture, settings: Settings) -> int:
    """What a feed-forward part makes in the backward pass, in addition to the gradient that runs along the blocks.

    Gated: two of the inner width in addition to what it keeps; an adapter whose input was cast makes one more. Fused
    adapters let their input go before that, and a quantised layer's weights are gone by then.
    """
    inner = settings.tokens * settings.compute_bytes * arch.inner
    whole = dequantised_bytes(arch, settings)
    if not settings.is_fused:
        return ((2 if arch.gated else 1) + (1 if settings.casts else 0)) * inner + whole
    if settings.is_mlp_fused(arch):
        return 3 * inner + whole
    freed = any(linear.reads == "mlp_out" for linear in settings.adapted(arch))
    return max((3 if arch.gated else 2) * inner - (inner if freed else 0), inner + whole)


def dequantised_bytes(arch: Architecture, settings: Settings) -> int:
    """The largest quantised layer in the compute format: it lives for one product (bitsandbytes MatMul4Bit)."""
    if not settings.is_quantised:
        return 0
    return settings.compute_bytes * max(linear.weights for linear in arch.linears)


def cast_adapter_bytes(arch: Architecture, settings: Settings) -> int:
    """16-bit copies of fp32 adapters, or of all weights, of all blocks: autocast keeps them until the forward pass
    ends, autograd longer."""
    stack = settings.stack
    makes_copies = settings.is_fused or stack.autocast
    kept_bytes = stack.full_bytes if settings.method == "full" else stack.adapter_bytes
    if not makes_copies or kept_bytes == settings.compute_bytes:
        return 0
    count = sum(rows * columns for rows, columns in settings.trainable(arch))
    return settings.compute_bytes * count * (2 if settings.takes_off_start else 1)


# --- the vocabulary -----------------------------------------------------------------------------------------


def logit_bytes(arch: Architecture, settings: Settings) -> int:
    """Vocabulary-wide tensors when the loss is taken.

    A block's logits in fp32, and before and after that in a 16-bit compute format; its rows' gradient in fp32 and what
    is added to it; scored hidden states and their gradient; of a head that is trained its gradient in fp32, and in the
    compute format before it is added. Cross-entropy keeps the log-probabilities; their gradient and the logits'
    gradient are made in addition: three tensors. Chunked and compiled: the logits in the compute format, and for an
    eighth of the tokens their gradient.
    """
    size, loss = settings.compute_bytes, settings.stack.loss
    scored = settings.tokens if settings.scored is None else settings.scored
    count = scored * arch.vocab
    if loss == "frozen head" and not arch.head_bias and not arch.logits_changed:
        rows, columns = min(scored, BLOCK_ROWS), min(arch.vocab, BLOCK_COLUMNS)
        formats = FP32 if size == FP32 else FP32 + 2 * size
        trained = (FP32 + size) * arch.vocab * arch.hidden if settings.method == "full" else 0
        of_block = rows * (formats * columns + (FP32 + size) * arch.hidden)
        return of_block + 2 * size * scored * arch.hidden + trained
    if loss == "chunked":
        return int(count * size * (1 + 1 / 8))
    copies = 3 + settings.stack.loss_copies
    return int(count * copies * (size if loss == "compute" else FP32))
